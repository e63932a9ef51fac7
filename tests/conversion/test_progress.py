from refold.conversion.progress import Phase, Progress


def test_steps_of_all_phases_count_up_to_one_sum() -> None:
    told: list[tuple[int, int]] = []
    progress = Progress(lambda done, total: told.append((done, total)))
    progress.expect("moments", 3)
    progress.expect("write", 2)
    run: list[tuple[Phase, int]] = [("moments", 3), ("write", 2)]
    for phase, steps in run:
        tell = progress.of(phase)
        for done in range(1, steps + 1):
            tell(done)
    assert told == [(step, 5) for step in range(1, 6)]


def test_a_phase_that_told_of_no_step_counts_as_done_in_the_next() -> None:
    told: list[tuple[int, int]] = []
    progress = Progress(lambda done, total: told.append((done, total)))
    progress.expect("ranks", 4)
    progress.expect("write", 1)
    progress.of("write")(1)
    assert told == [(5, 5)]


def test_a_later_number_of_steps_replaces_the_earlier_one() -> None:
    told: list[tuple[int, int]] = []
    progress = Progress(lambda done, total: told.append((done, total)))
    progress.expect("write", 9)
    progress.expect("write", 7)
    progress.of("write")(7)
    assert told == [(7, 7)]


def test_without_a_report_nobody_is_told() -> None:
    progress = Progress()
    progress.expect("maps", 1)
    assert progress.of("maps")(1) is None
