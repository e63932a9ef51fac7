"""The fit: measures once, chooses, looks, compares with single methods, heals, and writes model, recipe and report."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refold.blueprint.integers import FIT_SCHEMES
from refold.calibration.layers import SourceLayers
from refold.checkpoint.atomic_file import write_text
from refold.checkpoint.locate import Source
from refold.checkpoint.reader import CheckpointReader
from refold.conversion.measured import pack_text
from refold.data.corpus import Data
from refold.errors import FolderError, SourceError, given_or_default
from refold.fitting.budget import Budget, Limits
from refold.fitting.choose import cheapest, choose_several
from refold.fitting.device_table import clock_of, describe_other_machine, read_table
from refold.fitting.engines import EngineLimits
from refold.fitting.floor import check_budget
from refold.fitting.forecast import forecast
from refold.fitting.form_costs import timed_menu
from refold.fitting.front import write_page
from refold.fitting.heal_finalists import heal_finalists, measure_for_report
from refold.fitting.job import FitJob
from refold.fitting.left_out import leaving_parts, measure_leaving
from refold.fitting.look import STORED_BYTES, Looked, blueprint_costs
from refold.fitting.measure import MeasureSettings, measure_menu
from refold.fitting.menu import Costs, FitChoice, Menu
from refold.fitting.options import BUDGET_NAMES, FitOptions
from refold.fitting.report import FitPoint, FitReport
from refold.fitting.report_parts import ReportParts
from refold.fitting.saved_menu import MENU_NAME, read_menu
from refold.fitting.search import Search, Tried
from refold.fitting.single_methods import DTYPES, SINGLE_METHODS, Single, SingleFits
from refold.fitting.timed_parts import timed_parts
from refold.fitting.vocabulary import trim_menu
from refold.fitting.write_recipe import recipe_of
from refold.modeling.load import choose_device
from refold.nn.processor import fast_float32
from refold.planning.build import identity_blueprint
from refold.planning.replacements import PartPlace
from refold.sources.pieces import PieceReader


def fit(
    source: str | Path | Source,
    out: str | Path,
    budget: Budget,
    options: FitOptions | None = None,
    *,
    data: Data,
    held_out: Data | None = None,
) -> FitReport:
    """Finds the cheapest model of a source for a budget, and writes it.

    The folder gets `model/` (the folded model), `recipe.yaml` (from which `convert` makes it again), `front.json` (the
    report), and `measured/` (moments and menu, which another budget in the same folder uses again). An interrupted fit
    goes on where it stopped.

    Args:
        source: Folder or hub id.
        out: The folder of the fit.
        budget: Limits of bytes, cache, FLOPs, time or loss; see `refold.fitting.budget.parse_budget`.
        options: Healing tokens, engine, table of the device, number of looks, ...
        data: Text for measurements, fits and healing: best several kinds with weights (see `refold.data.corpus`).
        held_out: Text for the report, each source by itself; None: a part of `data` is held out.

    Raises:
        RefoldError: No model meets the budget (the message names the nearest), or an error of a stage.
    """
    return _run(source, out, [budget], given_or_default(options, FitOptions, "options"), data, held_out, is_sweep=False)


def sweep(
    source: str | Path | Source,
    out: str | Path,
    budgets: Sequence[Budget],
    options: FitOptions | None = None,
    *,
    data: Data,
    held_out: Data | None = None,
) -> FitReport:
    """Finds the best model for each of several budgets with one measuring pass, and writes recipes and report.

    Arguments and errors as for `fit`. No model is kept: `refold convert` makes each from its recipe.
    """
    return _run(source, out, budgets, given_or_default(options, FitOptions, "options"), data, held_out, is_sweep=True)


def _run(
    source: str | Path | Source,
    out: str | Path,
    budgets: Sequence[Budget],
    options: FitOptions,
    data: Data,
    held_out: Data | None,
    *,
    is_sweep: bool,
) -> FitReport:
    job = FitJob.open(source, out, options, data, held_out)
    for budget in budgets:
        if budget.latency is None:
            # Before anything is measured; times of the source need the table, which is read later.
            budget.limits(blueprint_costs(identity_blueprint(job.model.arch), budget.context))
    if options.dry_run:
        return forecast(job, budgets)
    with job.folder.claim(job.identity(), overwrite=options.overwrite):
        return FitRun(job, budgets).run(is_sweep)


LEAVING_ROUNDS = 3
"""Times that parts which would leave the model are measured, until no other ones would."""


class FitRun:
    """Carries out a fit whose folder is locked.

    Args:
        job: The checked fit.
        budgets: Budgets of one context.
    """

    def __init__(self, job: FitJob, budgets: Sequence[Budget]):
        self._job, self._budgets, self._context = job, budgets, budgets[0].context
        self._looker = job.looker(self._context)
        self._reported: dict[str, Looked] = {}
        self._device: str | None = None
        self._left: set[PartPlace] = set()
        self._engine = None if job.options.engine in (None, "any") else EngineLimits(job.options.engine, job.model.arch)
        if self._engine is not None:
            self._looker.exported_bytes = self._engine.exported_bytes

    def run(self, is_sweep: bool) -> FitReport:
        """Measures, searches every budget, and writes the results."""
        job = self._job
        menu = self._menu()
        engine = None if self._engine is None else self._engine.engine
        search = Search(menu, job.model.arch, self._look, self._is_legal, job.options.without, engine)
        parts = ReportParts(job, menu, self._context)
        points = [self._point(budget, search, parts, is_sweep) for budget in self._budgets]
        measured = next(iter(self._reported.values())).losses
        report = parts.report(points, measured, self._device)
        self._publish(report, is_sweep)
        return report

    def _point(self, budget: Budget, search: Search, parts: ReportParts, is_sweep: bool) -> FitPoint:
        """Searches one budget, and measures the result beside single methods."""
        options, watch = self._job.options, self._job.watch
        with watch.measure("search"):
            found = self._search(budget, search, is_sweep)
        limits = budget.limits(search.menu.source)._replace(loss=None)
        if budget.max_loss is not None:
            # Single methods are compared at the cost that was reached.
            quantity = BUDGET_NAMES[options.smallest]
            limits = limits._replace(**{quantity: getattr(found[0].looked.costs, quantity)})
        if options.tokens:
            with watch.measure("healing"):
                found = heal_finalists(self._looker, found, options.tokens)
        with watch.measure("report"):
            found = [measure_for_report(self._looker, each) for each in found[:2]]
        with watch.measure("single methods"):
            singles = self._singles(limits, search.menu.source)
        point = parts.point(budget, limits, found, singles)
        self._reported[point.name] = found[0].looked
        return point

    def _menu(self) -> Menu:
        """Returns the menu, measured or read, with times and measured drops, for the forms that the engine holds."""
        job, options = self._job, self._job.options
        with job.watch.measure("measuring"), self._open_layers() as layers:
            measured = menu = self._measured_menu(layers)
            if options.trim_vocabulary:
                menu = trim_menu(menu, job.model, job.train, job.shared)
            if options.device_table is not None:
                menu = self._timed_menu(measured, menu, options.device_table)
            if self._engine is not None:
                menu = self._engine.restrict(menu)
            for budget in self._budgets:
                check_budget(budget, menu, options.without)
            return self._measure_leaving(menu, layers)

    def _timed_menu(self, measured: Menu, menu: Menu, path: Path) -> Menu:
        """Returns a menu with times; those of the source are of its whole vocabulary."""
        table = read_table(path)
        line = describe_other_machine(table)
        self._job.notes.extend([line] if line else [])
        self._device, self._looker.table = table.machine.describe(), table
        whole, made = (
            timed_parts(timed_menu(each, clock_of(table)), table, self._job.model.arch) for each in (measured, menu)
        )
        return made.model_copy(update={"source": whole.source})

    @contextmanager
    def _open_layers(self) -> Iterator[SourceLayers]:
        model = self._job.model
        device = str(choose_device(self._job.options.device))
        with CheckpointReader(self._job.source.fetch()) as reader, fast_float32(device):
            yield SourceLayers(model, PieceReader(model, reader), device)

    def _measured_menu(self, layers: SourceLayers) -> Menu:
        """Reads the menu of this folder, or measures it."""
        job = self._job
        settings = MeasureSettings(context=self._context, seed=job.options.seed, schemes=FIT_SCHEMES)
        packed = pack_text(job.model, job.train, job.settings)
        try:
            return read_menu(job.folder.measured, job.source, settings.measured(layers, packed, job.train.name))
        except (FolderError, SourceError) as error:
            if (job.folder.measured / MENU_NAME).exists():
                job.options.show.say(f"measuring again: {error}")
        with job.options.show.progress("measuring", "steps") as report:
            return measure_menu(layers, packed, job.train.name, settings, job.folder.measured, report)

    def _measure_leaving(self, menu: Menu, layers: SourceLayers) -> Menu:
        """Measures parts that would leave the model at these budgets: the estimates of large changes are poor."""
        job = self._job
        for _ in range(LEAVING_ROUNDS):
            choices = []
            for budget in self._budgets:
                choices += self._first_choices(menu, budget)
            places = [each for each in leaving_parts(choices) if each not in self._left]
            if not places:
                break
            self._left.update(places)
            held_out = pack_text(job.model, job.look_text, job.leaving_settings)
            with (
                tempfile.TemporaryDirectory(dir=job.folder.measured) as scratch,
                job.options.show.progress("leaving out", "layers") as report,
            ):
                layered = lambda done: report(done, job.model.arch.num_layers)  # noqa: E731
                menu = measure_leaving(menu, sorted(self._left), layers, held_out, Path(scratch), layered)
        return menu

    def _first_choices(self, menu: Menu, budget: Budget) -> list[FitChoice]:
        """Returns the choices of a budget by uncorrected predictions."""
        without, limits = self._job.options.without, budget.limits(menu.source)._replace(loss=None)
        if budget.max_loss is None:
            return [each.choice for each in choose_several(menu, limits, 2, without)]
        quantity = BUDGET_NAMES[self._job.options.smallest]
        return [cheapest(menu, quantity, budget.max_loss, limits, without).choice]

    def _search(self, budget: Budget, search: Search, is_sweep: bool) -> list[Tried]:
        """Returns the candidates of a budget, the best first."""
        options, limits = self._job.options, budget.limits(search.menu.source)
        looks = options.looks_at_each(len(self._budgets))
        name = f"fit {budget.describe()}" if is_sweep else "fit"
        if budget.max_loss is not None:
            quantity = BUDGET_NAMES[options.smallest]
            return search.find_cheapest(limits._replace(loss=None), quantity, budget.max_loss, looks, name)
        return search.find(limits, looks, name)

    def _recipe(self, choice: FitChoice) -> dict[str, Any]:
        return {"dtype": DTYPES[STORED_BYTES], **self._job.shared, **recipe_of(choice, self._job.model.arch)}

    def _look(self, choice: FitChoice, name: str) -> Looked:
        return self._looker.look(self._recipe(choice), name)

    def _is_legal(self, looked: Looked) -> bool:
        return self._engine is None or self._engine.holds(looked.blueprint)

    def _singles(self, limits: Limits, source: Costs) -> list[Single]:
        """Makes and measures the best model of each single method within the limits."""
        judged = {name: limit for name, limit in limits._asdict().items() if limit is not None and name != "loss"}
        fits = SingleFits(self._looker, judged, source, self._job.shared)
        return [fits.make(method) for method in SINGLE_METHODS] if self._job.options.singles else []

    def _publish(self, report: FitReport, is_sweep: bool) -> None:
        """Writes recipes, page and report; a single fit keeps its model, healed if it was healed."""
        folder = self._job.folder
        folder.discard_result()
        if is_sweep:
            folder.withdraw()
            for point in report.points:
                write_text(folder.budget_recipe(point.name), point.recipe_text())
            write_page(report, folder.root)
        else:
            (point,) = report.points
            write_text(folder.recipe, point.recipe_text())
            looked = self._reported[point.name]
            if not folder.is_published(looked.folder):
                folder.publish(self._looker.make(looked.recipe, looked.name, looked.stages))
        report.write(folder.root, overwrite=True)
        folder.discard_models()
