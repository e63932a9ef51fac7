"""Attention of one layer replaced by a mixer with a smaller cache: a window, or linear attention with a fitted map."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refold.blueprint.schema import Pool
from refold.calibration.swaps import MixerSwap
from refold.conversion.map_fitter import FitSettings, MapFit
from refold.errors import RecipeError
from refold.families.arch import ArchSpec
from refold.fitting.form_costs import part_costs
from refold.fitting.kinds.kind import MeasuredPart, PartKind, mean_loss
from refold.fitting.menu import MenuMatrix, PartForm
from refold.mixers.attention import Attention
from refold.mixers.linear_attention import LinearAttention

WINDOW_SHARES = (2, 4, 8)
"""Windows are offered at the length of the sampled sequences divided by these; a longer one would show no error."""
SMALLEST_WINDOW = 16
FEATURE_WINDOWS = (64, 0)
"""Windows of softmax beside the features of linear attention."""
FIT = FitSettings(steps=30, learning_rate=0.1)
FIT_TOKENS = 256
"""First tokens of a sequence that a map is fitted to: an attention's weights have the square of their number."""


class OtherMixer(PartKind):
    """Offers windows of softmax attention, and linear attention whose feature map is fitted without training.

    All linears stay the source's, so the forms of their matrices hold. The loss is that of the error of the update on
    the sample; a map is fitted to the first half of the sequences, and its error measured on the others. A conversion
    fits the map to more text and for longer.
    """

    name = "mixer"
    pools = ("mixer",)

    def forms(self, part: MeasuredPart, whole: Sequence[MenuMatrix]) -> Iterator[PartForm]:
        swap: MixerSwap = part.extras[self.name]
        length = swap.stream.states.shape[1]
        layer_window = part.arch.layers[part.layer].window or part.context
        for window in (length // share for share in WINDOW_SHARES):
            if SMALLEST_WINDOW <= window < min(layer_window, part.context):
                update = swap.update(Attention(), window, {}).flatten(0, 1)
                yield PartForm(
                    kind=self.name,
                    setting={"type": "attention", "window": window},
                    loss=part.sample.loss_of(update - part.sample.updates),
                    costs=part_costs(Attention(), part.arch, window, part.context),
                    matrices=tuple(whole),
                )
        for window in FEATURE_WINDOWS:
            # A map is measured on other sequences than those that it is fitted to.
            if window < length and part.sample.num_sequences > 1:
                yield from self._linear(part, swap, window, whole)

    def write(self, recipe: dict[str, Any], arch: ArchSpec, chosen: Mapping[int, PartForm], pool: Pool) -> None:
        entries: list[dict[str, Any]] = recipe.setdefault("mixers", []) if chosen else []
        for layer, form in sorted(chosen.items()):
            entry = next((each for each in entries if form.setting.items() <= each.items()), None)
            if entry is None:
                entries.append({**form.setting, "depths": [layer]})
            else:
                entry["depths"].append(layer)

    def _linear(
        self, part: MeasuredPart, swap: MixerSwap, window: int, whole: Sequence[MenuMatrix]
    ) -> Iterator[PartForm]:
        setting: dict[str, int | str] = {
            "type": "linear_attention",
            "feature_map": "hedgehog",
            "window": window,
            "fit": "calibration",
        }
        try:
            mixer = LinearAttention.model_validate(setting).resolve(part.arch, "mixers[0]")
        except RecipeError:
            return  # A source that caps its scores has no window beside features.
        half = part.sample.num_sequences // 2
        fresh = MapFit(part.arch, mixer).fit(
            swap.start(mixer), [swap.attention(half, min(FIT_TOKENS, swap.stream.states.shape[1]))], FIT, seed=0
        )
        update = swap.update(mixer, None, fresh)
        errors = update - part.sample.by_sequence(part.sample.updates)
        held_out = slice(half, None)
        gradients = part.sample.by_sequence(part.sample.gradients)
        yield PartForm(
            kind=self.name,
            setting=setting,
            loss=mean_loss(gradients[held_out].flatten(0, 1), errors[held_out].flatten(0, 1)),
            costs=part_costs(mixer, part.arch, None, part.context),
            matrices=tuple(whole),
        )
