"""placeholder"""


def nemo_tokenizer(directory):
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

    return AutoTokenizer(directory)
