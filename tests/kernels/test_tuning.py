"""The tables of block configurations, falling back to smaller ones, and autotuning."""

import itertools

import pytest

from attnvariants import get_variant
from attnvariants_kernels import launch, tuning
from attnvariants_kernels._triton import triton, why_not
from attnvariants_kernels.launch import Config

needs_triton = pytest.mark.skipif(bool(why_not()), reason="needs Triton")
CELLS = list(
    itertools.product(tuning.KERNELS, tuning.ARCHITECTURES, tuning.WIDTHS, (2, 4), tuning.COSTS)
)
LONG = 4096, 4096
KiB = 1024
# what a workgroup may have
LIMITS = {"sm_80": 163 * KiB, "sm_90": 227 * KiB, "sm_100": 227 * KiB, "gfx942": 64 * KiB}
KIND = tuning.kind_of("forward", "sm_90", 128, "bfloat16", 1000, 4096, 0)


def found(kernel, architecture, width, itemsize, cost, lengths=LONG):
    return tuning.configs(kernel, architecture, width, itemsize, *lengths, cost)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_a_cell_has_powers_of_two_that_need_ever_less_memory(cell):
    kernel, _, width, itemsize, _ = cell
    configs = found(*cell)
    for config in configs:
        assert all(size & (size - 1) == 0 for size in config[:3])
        assert min(config[:2]) >= 16
        assert config.num_stages >= 1
    needs = [tuning.shared(kernel, config, width, itemsize) for config in configs]
    assert needs == sorted(set(needs), reverse=True)
    assert configs[-1][:2] == (16, 16)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_the_first_choice_fits_its_architecture(cell):
    kernel, architecture, width, itemsize, _ = cell
    config = found(*cell)[0]
    if architecture == "gfx942":
        # its tiles that stay are kept in registers
        config = config._replace(num_stages=1)
        side = config.block_m if kernel == "dkv" else config.block_n
        assert 2 * side * width * itemsize <= LIMITS[architecture]
    else:
        assert tuning.shared(kernel, config, width, itemsize) <= LIMITS[architecture]


def test_99_kib_are_enough_for_some_configuration():
    for kernel, width, itemsize, cost in itertools.product(
        tuning.KERNELS, tuning.WIDTHS, (2, 4), tuning.COSTS
    ):
        last = found(kernel, "sm_80", width, itemsize, cost)[-1]
        assert tuning.shared(kernel, last, width, itemsize) <= 99 * KiB


@pytest.mark.parametrize("lengths", [(1, 1), (1, 4096), (4096, 1), (17, 70)])
def test_short_calls_get_small_blocks(lengths):
    for config in found("forward", "sm_90", 128, 2, 0, lengths):
        assert config.block_m < max(17, 2 * lengths[0])
        assert config.block_n < max(17, 2 * lengths[1])


def test_widths_between_take_the_next_wider_table():
    assert found("dq", "sm_90", 80, 2, 0) == found("dq", "sm_90", 128, 2, 0)
    assert found("delta", "sm_90", 64, 2, 0) == found("dq", "sm_90", 64, 2, 0)


def test_hooks_with_another_function_are_other_hooks_to_the_disk_cache():
    hooks = get_variant("cosformer").hooks
    other = hooks._replace(fold=hooks.grad)
    assert other.cache_key != hooks.cache_key


class Fake:
    """A launch that takes some time or does not fit."""

    def __init__(self, config, times, log):
        self.config, self.times, self.log = config, times, log

    def run(self):
        self.log.append(self.config)
        if self.times[self.config] is None:
            raise triton.runtime.errors.OutOfResources(300 * KiB, 227 * KiB, "shared memory")


BIG, MIDDLE, SMALL = Config(128, 128, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 4, 1)


@pytest.fixture
def compiled(monkeypatch):
    """The order of a GPU also where kernels are interpreted."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


@needs_triton
def test_what_does_not_fit_is_followed_by_the_next(compiled):
    log = []
    times = {BIG: None, MIDDLE: None, SMALL: 1.0}
    used = launch.run_first(lambda config: [Fake(config, times, log)], [BIG, MIDDLE, SMALL])
    assert used == SMALL
    assert log == [BIG, MIDDLE, SMALL]


@needs_triton
def test_where_nothing_fits_the_last_error_is_raised(compiled):
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        launch.run_first(lambda config: [Fake(config, {BIG: None}, [])], [BIG])


@pytest.fixture
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(tuning, "_chosen", {})


def clock(times, log):
    """Times a run by what the fake it ran says."""

    def time(run):
        run()
        return times[log[-1]]

    return time


@needs_triton
def test_autotuning_keeps_the_fastest_that_fits_and_times_once(nothing_chosen):
    log = []
    times = {BIG: None, MIDDLE: 1.0, SMALL: 2.0}

    def choose():
        return tuning.choose(
            KIND,
            [BIG, SMALL, MIDDLE],
            lambda config: [Fake(config, times, log)],
            clock(times, log),
        )

    assert choose() == MIDDLE
    assert log == [BIG, SMALL, MIDDLE]
    assert choose() == MIDDLE
    assert len(log) == 3


@needs_triton
def test_autotuning_where_nothing_fits_keeps_what_ships(nothing_chosen):
    times = dict.fromkeys([BIG, SMALL])
    chosen = tuning.choose(
        KIND, [BIG, SMALL], lambda config: [Fake(config, times, [])], clock(times, [])
    )
    assert chosen == BIG


def test_lengths_share_a_choice_up_to_a_power_of_two():
    about = "forward", "sm_90", 128, "bfloat16"
    assert tuning.kind_of(*about, 513, 1024, 0) == tuning.kind_of(*about, 1000, 600, 0)
    assert tuning.kind_of(*about, 512, 1024, 0) != tuning.kind_of(*about, 513, 1024, 0)


@pytest.mark.parametrize("architecture", tuning.ARCHITECTURES)
def test_alternatives_begin_with_what_ships_and_are_a_handful(architecture):
    for kernel, width, cost in itertools.product(tuning.KERNELS, tuning.WIDTHS, tuning.COSTS):
        first, *others = tuning.alternatives(kernel, architecture, width, 2, *LONG, cost)
        assert first == found(kernel, architecture, width, 2, cost)[0]
        assert 1 <= len(others) <= 12
        assert first not in others


def test_autotuning_is_off_until_asked_for(monkeypatch):
    monkeypatch.setattr(tuning, "_autotune", False)
    assert not tuning.autotunes()
    tuning.set_autotune(True)
    assert tuning.autotunes()
    tuning.set_autotune(False)
    assert not tuning.autotunes()
