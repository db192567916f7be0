"""Publishing an exported directory on a Hugging Face hub, by huggingface_hub; the address is its HF_ENDPOINT."""

from pathlib import Path

from nemo_minitron.errors import InputError


def check_repository(name: str, *, push: bool) -> None:
    """Refuse what the hub would.

    Args:
        name: ORG/NAME.
        push: whether anything is to be sent, for which a token is needed.

    Raises:
        InputError: no such name, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = f"{name[:100]}/" if "/" in name else name[:100]
    if name.count("/") != 1 or not all(name.split("/")):
        raise InputError(f"publish={name}: must be ORG/NAME, of letters, digits, -, _ and .")
    if push and get_token() is None:
        raise InputError("push=true: no token; log in with `huggingface-cli login`, or set HF_TOKEN")


def files_of(directory: Path) -> list[tuple[str, int]]:
    """What would be sent: each file's path in the repository and its bytes."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return [(str(path.relative_to(directory)), path.stat().st_size) for path in found]


def listing(directory: Path, repository: str) -> str:
    """`files_of` for people."""
    files = files_of(directory)
    lines = [f"{size:>15,}  {name}" for name, size in files]
    total = sum(size for _, size in files)
    return "\n".join([f"{repository}: {len(files)} files, {total:,} bytes", *lines])


def push(directory: Path, repository: str) -> str:
    """Make the repository, private if it is new, and send the files in one commit.

    Returns:
        The commit's address.

    Raises:
        RuntimeError: the hub refuses, or cannot be reached; nothing of it is then visible.
    """
    from huggingface_hub import HfApi
    from requests import RequestException

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=str(directory), commit_message="Exported")
    except (RequestException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RuntimeError(f"publish={repository}: {type(error).__name__}: {reason}") from None
    return str(done.commit_url)
