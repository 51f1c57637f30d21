"""A tokenizer from a folder's own files, whatever model lies there."""

from pathlib import Path

from ..errors import InputError


def open_tokenizer(folder: Path):
    """The Hugging Face tokenizer of a folder: nothing is fetched, and no code of it is run.

    Raises `InputError` where there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has many ways to fail
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{folder}: has no tokenizer that can be read ({reason}); copy tokenizer.json and "
            "tokenizer_config.json from the model that it was made of."
        ) from error
