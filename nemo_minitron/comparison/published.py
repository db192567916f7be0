"""Figures that others published, for reference: they are measured with other harnesses, prompts and precisions.

Source: arXiv 2408.11796 (base models; the instruct models of its version 4, table 2; sizes; throughput).
"""

SOURCE = "arXiv 2408.11796"
# (title, columns, rows); "" where the source has none.
TABLES: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]], ...] = (
    (
        f"Base models, % ({SOURCE})",
        (
            *("model", "Winogrande 5", "ARC-C 25", "MMLU 5", "HellaSwag 10", "GSM8K 5", "TruthfulQA 0"),
            *("XLSum", "MBPP 0"),
        ),
        (
            ("Llama-3.1-8B", "77.3", "57.9", "65.3", "81.8", "48.6", "45.0", "30.0", "42.3"),
            ("Llama-3.1-Minitron-4B-Depth", "72.1", "52.6", "58.7", "73.2", "16.8", "38.2", "27.2", "30.7"),
            ("Llama-3.1-Minitron-4B-Width", "73.5", "55.6", "60.5", "76.1", "41.2", "42.9", "28.7", "32.4"),
            ("Phi-2", "74", "61", "57.5", "75.2", "55", "44", "1", "47"),
            ("Gemma 2 2.6B", "70.9", "55.4", "51.3", "73.0", "23.9", "", "", "29.6"),
            ("Qwen2 1.5B", "66.2", "43.9", "56.5", "66.6", "58.5", "45.9", "", "37.4"),
        ),
    ),
    (
        f"Instruct models, Minitron's after RPO ({SOURCE}v4, table 2)",
        ("model", "IFEval", "BFCL v2 live", "MT-Bench", "GSM8K"),
        (
            ("Llama-3.1-Minitron-4B-Width", "79.54", "55.0", "6.88", "79.76"),
            ("Llama-3.1-Minitron-4B-Depth", "66.77", "55.89", "6.19", "71.11"),
            ("Phi-2", "44.0", "38.7", "5.14", "19.9"),
            ("Gemma 2 2.6B", "64.5", "40.2", "7.44", "52.2"),
            ("Qwen2 1.5B", "39.8", "39.9", "5.49", "27.2"),
        ),
    ),
    (
        f"Size, and throughput against Llama-3.1-8B by TensorRT-LLM in FP8 on one H100 ({SOURCE})",
        ("model", "parameters", "non-embedding", "throughput"),
        (
            ("Llama-3.1-8B", "8.03B", "6.98B", "1x"),
            ("Llama-3.1-Minitron-4B-Width", "4.51B", "3.72B", "1.8x"),
            ("Llama-3.1-Minitron-4B-Depth", "4.54B", "3.49B", "2.7x"),
        ),
    ),
)
