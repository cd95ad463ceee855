"""Two ranks under everything at once: killed one or all, asked to stop, a full disk, a damaged checkpoint.

Each start is ended by one event at a random moment; the next start goes on. In the end the weights are those of the run
that nothing disturbed, bit for bit; no start took up a damaged checkpoint; nothing waited longer than its bound.
"""

from __future__ import annotations

import random
import re
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.ranks import Ranks, assert_same_pretraining
from tests.chaos.test_lost_ranks import GONE_S
from tests.chaos.test_stops import STOP_S

SMALLEST_FILE = 2**18  # bytes a file may have on the "full disk"; a checkpoint's are larger, all others smaller
EVERY = 3  # steps a checkpoint


class Chaos:
    """One run directory, and the starts that work on it."""

    def __init__(self, livt, run_dir: Path, *, seed: int, **sets) -> None:
        self.livt, self.run_dir, self.sets = livt, run_dir, {"checkpoint__every_steps": EVERY, **sets}
        self.rng = random.Random(seed)
        self.folder = run_dir / "pretrain" / "checkpoints"
        self.damaged: str | None = None
        self.longest_s = {"kill": 0.0, "stop": 0.0}

    def start(self) -> Ranks:
        return Ranks(self.livt, self.run_dir, "slow:0.03", **self.sets)

    def steps_behind(self) -> int:
        path = self.run_dir / "pretrain" / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def newest(self) -> int:
        return max((int(p.name[5:]) for p in self.folder.glob("step-*")), default=0)

    def some_steps_on(self, ranks: Ranks) -> None:
        """Until a step of this start after which there is a newer checkpoint, then a random moment more."""
        saved, more = self.newest(), self.rng.randint(1, EVERY)
        ranks.wait_for(lambda: self.newest() > saved)
        seen = self.steps_behind()
        ranks.wait_for(lambda: self.steps_behind() >= seen + more)
        time.sleep(self.rng.uniform(0, 0.1))

    def kill(self, victims: list[int]) -> None:
        with self.start() as ranks:
            self.some_steps_on(ranks)
            for rank in victims:
                ranks.kill(rank)
            codes, took_s = ranks.ended(within_s=60)
            self.check(ranks)
        assert [codes[rank] for rank in victims] == [-signal.SIGKILL] * len(victims)
        assert [codes[rank] for rank in (0, 1) if rank not in victims] == [1] * (2 - len(victims))
        self.longest_s["kill"] = max(self.longest_s["kill"], took_s)

    def stop(self, victims: list[int], number: int) -> None:
        with self.start() as ranks:
            self.some_steps_on(ranks)
            for rank in victims:
                ranks.kill(rank, number)
            codes, took_s = ranks.ended(within_s=90)
            self.check(ranks)
            assert codes == [85, 85], ranks.said(0)
        self.longest_s["stop"] = max(self.longest_s["stop"], took_s)

    def full_disk(self) -> None:
        """One start whose saves all fail; the limit on a file's size, which is inherited, stands for the disk."""
        before, saved = resource.getrlimit(resource.RLIMIT_FSIZE), self.newest()
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST_FILE, before[1]))
        try:
            ranks = self.start()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with ranks:
            ranks.wait_for(lambda: "was not saved" in ranks.said(0) or not ranks.running)
            ranks.kill(0)
            ranks.kill(1)
            ranks.ended(within_s=30)
            self.check(ranks)
        assert self.newest() == saved

    def flip_a_byte(self) -> None:
        newest = self.folder / f"step-{self.newest():08d}"
        victim = self.rng.choice(sorted(p for p in newest.iterdir() if p.stat().st_size))
        raw = bytearray(victim.read_bytes())
        raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
        victim.write_bytes(raw)
        self.damaged = newest.name

    def check(self, ranks: Ranks) -> None:
        """What this start went on from was whole, and a damaged one was named."""
        said = ranks.said(0)
        taken = re.search(r"resumed from (step-\d+)", said)
        if self.damaged is not None:
            assert f"{self.damaged} is damaged and not used" in said
            assert taken is None or taken[1] < self.damaged
            self.damaged = None
        assert "Traceback" not in said + ranks.said(1)

    def finish(self) -> None:
        with self.start() as ranks:
            codes, _ = ranks.ended(within_s=240)
            self.check(ranks)
            assert codes == [0, 0], ranks.said(0)
        assert self.longest_s["kill"] < GONE_S
        assert self.longest_s["stop"] < STOP_S


def events(chaos: Chaos, *, kills: int, stops: int) -> list:
    """In random order: kills of one or all, requests to one or all, one full disk, one flipped byte."""
    rng, ranks, signals = chaos.rng, ([0], [1], [0, 1]), (signal.SIGUSR2, signal.SIGTERM)
    drawn = [partial(chaos.kill, rng.choice(ranks)) for _ in range(kills)]
    drawn += [partial(chaos.stop, rng.choice(ranks), rng.choice(signals)) for _ in range(stops)]
    rng.shuffle(drawn)
    at = rng.randrange(1, len(drawn))
    return [*drawn[:at], chaos.full_disk, *drawn[at:-1], chaos.flip_a_byte, drawn[-1]]


def run_under(livt, *, kills: int, stops: int, seed: int, epochs: int) -> None:
    sets = {"stages__pretrain__epochs": epochs, "log__num_reconstructions": 0, "checkpoint__keep_last": 3}
    whole, broken = livt.folder / "whole", livt.folder / "broken"
    with Ranks(livt, whole, checkpoint__every_steps=EVERY, **sets) as ranks:
        assert ranks.ended(within_s=240)[0] == [0, 0], ranks.said(0)
    chaos = Chaos(livt, broken, seed=seed, **sets)
    for event in events(chaos, kills=kills, stops=stops):
        event()
    chaos.finish()
    print(f"{kills} kills, {stops} requests to stop; longest until all ended: {chaos.longest_s}")
    assert_same_pretraining(broken, whole)


@pytest.mark.slow
def test_a_little_of_everything_changes_nothing(livt):
    run_under(livt, kills=2, stops=1, seed=1, epochs=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_ten_stops_a_full_disk_and_a_flipped_byte_change_nothing(livt):
    run_under(livt, kills=20, stops=10, seed=7, epochs=30)
