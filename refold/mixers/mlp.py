"""The MLP of a source: gated (such as SwiGLU) or plain."""

from refold.families.arch import ArchSpec
from refold.mixers.spec import PartSpec, Shape, outer_norms


class MlpSpec(PartSpec):
    """The source's MLP, which has no options."""

    url = "https://arxiv.org/abs/2002.05202"

    def linears(self, arch: ArchSpec) -> dict[str, tuple[int, int]]:
        up = (arch.intermediate_size, arch.hidden_size)
        return {
            **({"gate_proj": up} if arch.gated_mlp else {}),
            "up_proj": up,
            "down_proj": (arch.hidden_size, arch.intermediate_size),
        }

    def vectors(self, arch: ArchSpec) -> dict[str, Shape]:
        found = outer_norms(arch)
        if arch.mlp_bias:
            found |= {f"{name}.bias": (shape[0],) for name, shape in self.linears(arch).items()}
        return found


MLP = MlpSpec()
