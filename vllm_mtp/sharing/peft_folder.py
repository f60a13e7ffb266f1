# SPDX-License-Identifier: Apache-2.0
"""Read and write the folder of a PEFT adapter, as `PeftModel.save_pretrained` has it.

``adapter_config.json`` is peft's `LoraConfig` as JSON, ``adapter_model.safetensors``
has a pair of matrices for each linear module. Engines that draft with an Uno adapter
read ``r``, ``lora_alpha``, ``target_modules`` and the pairs, and scale by alpha / r
(``nano_vllm_uno/utils/lora.py`` in github.com/ifm-ai/uno; vLLM's ``PEFTHelper``). The
number of drafts and the noise tokens are no part of such a folder: they are settings of
the engine. So a file of ours, ``noise.json``, stands beside them where we wrote it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_mtp.drafter.config import NoiseConfig
from vllm_mtp.drafter.target_facts import MAX_SIZE
from vllm_mtp.errors import MTPError, refusal_of
from vllm_mtp.files import write_whole, writing

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NOISE_FILE = "noise.json"

_FIRST = 3  # of many tensors that are wrong, so many are named


class AdapterError(MTPError):
    """A PEFT folder is broken, or says what a drafter cannot."""


class AdapterConfig(BaseModel):
    """The fields of peft's `LoraConfig` that decide what a drafter is."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    r: int = Field(ge=1, le=MAX_SIZE)
    lora_alpha: float = Field(gt=0, le=MAX_SIZE)
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    init_lora_weights: bool | str = True
    # Only told on.
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_version: str | None = None


# Together with `SILENT` and `REFUSED` these are all fields of peft's `LoraConfig`; a
# test fails where a new version of peft has one that is in none.
HONOURED = frozenset(AdapterConfig.model_fields)
# Of training, of the start values or of the loader: whatever they say, pairs that are
# saved act the same.
SILENT = frozenset((
    "task_type", "auto_mapping", "inference_mode", "lora_dropout", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_core", "runtime_config",
    "qalora_group_size", "ensure_weight_tying",
))  # fmt: skip
_MORE_TENSORS = "a drafter has low-rank pairs on linear modules, and no more tensors"
_VARIANT = "such an adapter computes something else than alpha / r * B A x"
REFUSED: Mapping[str, str] = {
    "fan_in_fan_out": "its matrices lie the other way round",
    "bias": _MORE_TENSORS,
    "modules_to_save": _MORE_TENSORS,
    "trainable_token_indices": _MORE_TENSORS,
    "lora_bias": _MORE_TENSORS,
    "target_parameters": "a drafter's pairs stand on linear modules, not on parameters",
    "layer_replication": "the target would have more layers than it has",
    "megatron_config": "its modules are Megatron's, cut over processes",
    "use_dora": _VARIANT,
    "velora_config": _VARIANT,
    "alora_invocation_tokens": "it acts behind chosen tokens, and a drafter's pairs on "
    "its placeholders",
    "use_qalora": _VARIANT,
    "monteclora_config": _VARIANT,
    "use_bdlora": _VARIANT,
    "arrow_config": "it chooses among several adapters",
    "kasa_config": _VARIANT,
}
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {}, "")
# Other start values are cut out of the base model's weights, which are changed by that.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class Pair(NamedTuple):
    """The change of one linear module: ``scale * B A x``."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds.

    Attributes:
        config: What it says of its pairs.
        pairs: By the module's path in the model that it was trained in, such as
            ``model.layers.0.self_attn.q_proj``.
        noise: The tokens that we wrote beside it, if we did.
        config_sha256: Of its ``adapter_config.json``.
    """

    config: AdapterConfig
    pairs: Mapping[str, Pair]
    noise: NoiseConfig | None
    config_sha256: str


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder.

    Raises:
        AdapterError: It is none, or names the field or tensor that no drafter can have.
    """
    path = folder / CONFIG_FILE
    text = _read(path)
    given = _json_object(path, text)
    _refuse_fields(path, given)
    try:
        honoured = {key: value for key, value in given.items() if key in HONOURED}
        config = AdapterConfig.model_validate_json(json.dumps(honoured))
    except ValidationError as error:
        raise AdapterError(f"{path}: {_refusal(error)}") from None
    _require_plain(path, config)
    noise = folder / NOISE_FILE
    return Adapter(
        config,
        _read_pairs(folder / WEIGHTS_FILE),
        _read_noise(noise) if noise.is_file() else None,
        hashlib.sha256(text.encode()).hexdigest(),
    )


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    pairs: Mapping[str, Pair],
    noise: NoiseConfig,
) -> None:
    """Write a PEFT folder; `read_adapter` gives the same pairs, byte for byte.

    Args:
        folder: Made if need be.
        config: The fields of ``adapter_config.json``.
        pairs: As in `Adapter`.
        noise: The drafter's tokens.

    Raises:
        OutputError: It cannot be written.
    """
    tensors = {
        f"base_model.model.{path}.lora_{letter}.weight": tensor.contiguous()
        for path, pair in pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The config last: a folder with one has the weights of it.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_whole(folder / NOISE_FILE, noise.model_dump_json(indent=2) + "\n")
        write_whole(folder / CONFIG_FILE, json.dumps(dict(config), indent=2) + "\n")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file{_elsewhere(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: cannot be read ({error})") from None


def _elsewhere(path: Path) -> str:
    found = sorted(path.parent.glob(f"*/{CONFIG_FILE}"))
    if found:
        return f"; it stands in {found[0].parent.name}: --subfolder names that"
    return ", expected the folder of a PEFT adapter (adapter_config.json and weights)"


def _json_object(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path}: got {type(found).__name__}, expected an object")
    return found


def _refuse_fields(path: Path, given: Mapping[str, Any]) -> None:
    kind = given.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type: got {kind!r}, expected 'LORA'")
    for name, value in given.items():
        if name in HONOURED or name in SILENT or value in _NOTHING:
            continue
        why = REFUSED.get(name, "this version of vllm-mtp does not know the field")
        raise AdapterError(
            f"{path}: {name}: got {str(value)[:80]}, expected nothing: {why}"
        )


def _require_plain(path: Path, config: AdapterConfig) -> None:
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights: got {config.init_lora_weights!r}, which "
            "changes the base model's weights; save the adapter with peft's "
            "path_initial_model_for_weight_conversion"
        )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name)
        # A list names modules by their ends, but lists of layers by expressions.
        if isinstance(value, str) or name == "layers_pattern":
            for pattern in (value,) if isinstance(value, str) else value or ():
                _require_pattern(path, name, pattern)
    for name in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(config, name).items():
            _require_pattern(path, name, key)
            if not 0 < value <= MAX_SIZE:
                raise AdapterError(f"{path}: {name}: got {value} for {key!r}")


def _require_pattern(path: Path, name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(
            f"{path}: {name}: {pattern!r} is no regular expression ({error})"
        ) from None


def _read_pairs(path: Path) -> dict[str, Pair]:
    if not path.is_file():
        raise AdapterError(
            f"{path}: no such file; only safetensors weights are read, and no pickle "
            "(adapter_model.bin): load the adapter with peft and save it again"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({error})") from None
    halves: dict[str, dict[str, torch.Tensor]] = {}
    odd = []
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.ndim != 2:
            odd.append(name)
        else:
            halves.setdefault(match["path"], {})[match["half"]] = tensor
    odd += [f"{name} (half of it)" for name in halves if len(halves[name]) == 1]
    if odd or not halves:
        raise AdapterError(
            f"{path}: expected lora_A and lora_B of linear modules alone, got "
            f"{', '.join(odd[:_FIRST]) or 'no tensor'}"
            + f" and {len(odd) - _FIRST} more"
            * (len(odd) > _FIRST)
        )
    _require_numbers(path, tensors)
    return {name: Pair(half["A"], half["B"]) for name, half in sorted(halves.items())}


_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<half>[AB])\.weight"
)


def _require_numbers(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    types = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    if len(types) > 1 or types[0] not in ("bfloat16", "float16", "float32"):
        raise AdapterError(
            f"{path}: its tensors are {', '.join(types)}, expected all of one type: "
            "bfloat16, float16 or float32"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {name} holds values that are not finite")


def _read_noise(path: Path) -> NoiseConfig:
    try:
        return NoiseConfig.model_validate_json(_read(path))
    except ValidationError as error:
        raise AdapterError(f"{path}: {_refusal(error)}") from None


def _refusal(error: ValidationError) -> str:
    item = error.errors()[0]
    if item["type"] == "missing":
        return f"{item['loc'][0]}: missing"
    return refusal_of(error)
