"""A GGUF file as a source: config, headers with the names of transformers, and companions made of its metadata."""

import hashlib
import json
import struct
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from refold.blueprint.source_tensors import source_tensors
from refold.checkpoint.gguf.block_types import PLAIN, QUANTISED
from refold.checkpoint.gguf.config import make_config
from refold.checkpoint.gguf.container import GgufFile, MetadataValue, read_gguf
from refold.checkpoint.gguf.rope_factors import find_llama3_scaling
from refold.checkpoint.gguf.shards import list_shards
from refold.checkpoint.gguf.tokenizer import make_tokenizer_files
from refold.checkpoint.headers import CheckpointHeaders, TensorInfo, stored_dtype
from refold.checkpoint.locate import CONFIG_NAME, Source, hash_weight_files, sample_weight_files
from refold.checkpoint.source_file import read_range
from refold.errors import SourceError
from refold.families.arch import ArchSpec, Family
from refold.families.llama_cpp import ROPE_FACTORS, RowOrder, row_order, tensor_name
from refold.families.registry import find_family, read_arch

MAX_FACTORS = 1 << 16


class StoredAs(NamedTuple):
    """The differences of a tensor in the file: the order of its rows, and a number that was added to its values."""

    order: RowOrder
    head_dim: int
    offset: float


class GgufSource(Source):
    """A model in a GGUF file, or in the files of which the first is given.

    Args:
        path: The file.

    Raises:
        SourceError: The file is damaged, holds no language model of a supported architecture, or a shard is missing.
    """

    def __init__(self, path: Path):
        self.path: Path = path
        self._files = {file.name: read_gguf(file) for file in list_shards(path)}
        self._metadata: Mapping[str, MetadataValue] = self._files[path.name].metadata
        self._tensors = self._join()
        self._companions: tempfile.TemporaryDirectory[str] | None = None

    @property
    def where(self) -> str:
        return str(self.path)

    def fetch(self) -> Path:
        return self.path

    def fetch_companions(self) -> Path:
        """Returns a temporary folder, removed with this object or at the end of the process."""
        if self._companions is None:
            config = {**self.read_config(), "dtype": self._dtype()}
            files = make_tokenizer_files(self.where, self._metadata, config)
            self._companions = tempfile.TemporaryDirectory(prefix="refold-gguf-")
            for name, text in {CONFIG_NAME: json.dumps(config, indent=2), **files}.items():
                target = Path(self._companions.name) / name
                target.parent.mkdir(exist_ok=True)
                target.write_text(text, encoding="utf-8")
        return Path(self._companions.name)

    def read_config(self) -> dict[str, Any]:
        """Returns a config as transformers has it, made of the metadata.

        Raises:
            SourceError: A key is missing or wrong, or the model has another architecture than refold's families.
        """
        return dict(self._config)

    def fingerprint(self) -> dict[str, str | None]:
        """Returns the hashes that identify this source: of the metadata, of the headers, and of a sample of tensors."""
        headers = self._headers
        return {
            "config_sha256": self._files[self.path.name].metadata_sha256,
            "index_sha256": headers.sha256,
            **sample_weight_files(self.path.parent, headers),
        }

    def hash_files(self) -> str | None:
        return hash_weight_files(self.path.parent, self._headers)

    def stored_as(self, name: str) -> StoredAs:
        """Tells how a tensor, named as in transformers, differs in the file."""
        return self._places[name][1]

    @cached_property
    def _config(self) -> dict[str, Any]:
        shapes = {name: info.shape for name, info in self._tensors.items()}
        return make_config(self.where, self._metadata, shapes, self._find_scaling)

    @cached_property
    def _places(self) -> dict[str, tuple[TensorInfo, StoredAs]]:
        """The tensors by their name in transformers; those without one keep that of llama.cpp."""
        arch, family = read_arch(self._config), find_family(self._config["model_type"])
        known = {
            tensor_name(tensor.rule.pieces, tensor.layer): tensor for tensor in source_tensors(arch, family).values()
        }
        found: dict[str, tuple[TensorInfo, StoredAs]] = {}
        for name, info in self._tensors.items():
            if name == ROPE_FACTORS:
                continue
            tensor = known.get(name)
            if tensor is None:
                found[name] = (info, StoredAs("same", 1, 0.0))
                continue
            if info.dtype not in PLAIN | QUANTISED:
                raise SourceError(
                    f"{self.where}: {name}: type must be one of {', '.join(sorted(PLAIN | QUANTISED))} (got "
                    f"{info.dtype}); quantise the original to another type"
                )
            found[tensor.name] = (info, _stored_as(arch, family, tensor.rule.pieces))
        return found

    @cached_property
    def _headers(self) -> CheckpointHeaders:
        digest = hashlib.sha256("".join(file.tensors_sha256 for file in self._files.values()).encode())
        return CheckpointHeaders(
            tensors={name: info for name, (info, _) in self._places.items()},
            files={name: file.num_bytes for name, file in self._files.items()},
            sha256=digest.hexdigest(),
        )

    def _join(self) -> dict[str, TensorInfo]:
        """Returns the tensors of all files.

        Raises:
            SourceError: The files do not belong together.
        """
        tensors: dict[str, TensorInfo] = {}
        for number, (name, file) in enumerate(self._files.items()):
            if len(self._files) > 1:
                self._check_shard(number, name, file)
            for tensor, info in file.tensors.items():
                if tensor in tensors:
                    raise SourceError(
                        f"{self.where}: each tensor is required once (got {tensor} in {tensors[tensor].file} and "
                        f"{name}); download the files again"
                    )
                tensors[tensor] = info
        total = self._metadata.get("split.tensors.count", len(tensors))
        if total != len(tensors):
            raise SourceError(
                f"{self.where}: {str(total)[:20]} tensors are required by split.tensors.count (got {len(tensors)}); "
                f"complete the download, or name the first file as llama.cpp does: NAME-00001-of-00003.gguf"
            )
        return tensors

    def _check_shard(self, number: int, name: str, file: GgufFile) -> None:
        for key, required in (("split.no", number), ("split.count", len(self._files))):
            if file.metadata.get(key) != required:
                raise SourceError(
                    f"{self.path.with_name(name)}: metadata {key}: {required} is required (got "
                    f"{str(file.metadata.get(key))[:40]}); download the files again, and do not rename them"
                )

    def _find_scaling(self, theta: float) -> dict[str, Any]:
        info = self._tensors[ROPE_FACTORS]
        if info.dtype != "F32" or len(info.shape) != 1 or info.num_elements > MAX_FACTORS:
            raise SourceError(
                f"{self.where}: {ROPE_FACTORS}: a row of F32 is required (got {info.dtype} {list(info.shape)}); "
                f"convert the model again"
            )
        factors = struct.unpack(f"<{info.num_elements}f", self._read_range(info.file, info.start, info.num_bytes))
        found = find_llama3_scaling(factors, theta)
        if found is None:
            raise SourceError(
                f"{self.where}: {ROPE_FACTORS}: the factors of a llama3 rope are required (got others, from "
                f"{min(factors):g} to {max(factors):g}); take the transformers folder of the model"
            )
        return found

    def _read_range(self, file: str, start: int, size: int) -> bytes:
        return read_range(self.path.with_name(file), start, size)

    def _dtype(self) -> str:
        known = [name for name in self._headers.tensors if name not in self._tensors]
        return stored_dtype(self.where, self._headers, known)


def _stored_as(arch: ArchSpec, family: Family, pieces: tuple[str, ...]) -> StoredAs:
    kind = pieces[0].rsplit(".", 1)[0].rpartition(".")[2]
    is_norm_weight = "norm" in kind and pieces[0].endswith(".weight")
    return StoredAs(row_order(family, pieces), arch.head_dim, arch.norm.offset if is_norm_weight else 0.0)
