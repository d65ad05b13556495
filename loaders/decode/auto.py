"""decode=auto on a GPU: tries both decoders while training starts and keeps the one that training waits less for."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from loaders.decode.decoder import Decoder
from loaders.samples import Clip

log = logging.getLogger("loaders")

TURN = 8  # batches in a row by the same decoder
TURNS = 8  # of both together; the first of each is not counted: the queue fills, kernels and pipelines are made
LEAD = 0.97  # of the CPU path's time that DALI must stay below: the CPU path leaves the GPU to training


class AutoDecoder:
    """See loaders.decode.decoder.Decoder: two of them in turns, and then the faster one.

    What is compared is the time from batch to batch: in the long run batches are asked for as fast as training takes
    them, so it holds the waiting as well as what the decoder takes from the step. The median of the turns is taken,
    because one of them may hold an evaluation or a checkpoint.
    """

    def __init__(self, cpu: Decoder, dali: Decoder, clock: Callable[[], float] = time.perf_counter) -> None:
        self._order, self._clock = (cpu, dali), clock
        self._lock = threading.Lock()
        self._batches = 0
        self._turn_began = 0.0
        self._seconds: dict[str, list[float]] = defaultdict(list)  # of a batch, in each turn
        self._running = {cpu.name: 0, dali.name: 0}
        self._chosen: Decoder | None = None
        self._loser: Decoder | None = None  # until it is closed

    @property
    def name(self) -> str:
        """The decoder that was chosen, or auto."""
        return "auto" if self._chosen is None else self._chosen.name

    def decode(self, clips: Sequence[Clip]) -> tuple[torch.Tensor, dict[int, str]]:
        """See Decoder."""
        with self._lock:
            decoder = self._next()
            self._running[decoder.name] += 1
        try:
            return decoder.decode(clips)
        except RuntimeError as error:
            if not self._gives_up_dali(decoder, error):
                raise
        finally:
            with self._lock:
                self._running[decoder.name] -= 1
                unused = self._loser if self._loser is not None and not self._running[self._loser.name] else None
                self._loser = None if unused is not None else self._loser
            if unused is not None:
                unused.close()
        return self._order[0].decode(clips)

    def _gives_up_dali(self, decoder: Decoder, error: RuntimeError) -> bool:
        """Whether an error of a decoder only means that the CPU path decodes: DALI's, while both are tried.

        As a rule the GPU has not enough memory for DALI beside training. An error of a broken device comes back at the
        next training step.
        """
        cpu, dali = self._order
        with self._lock:
            if decoder is not dali or self._chosen is dali:
                return False
            if self._chosen is None:
                log.warning("decode=auto: images are decoded on the CPU from here on, because %s", error)
                self._chosen, self._loser = cpu, dali
        return True

    def _next(self) -> Decoder:
        """The decoder of the next batch."""
        if self._chosen is not None:
            return self._chosen
        turn, place = divmod(self._batches, TURN)
        if place == 0:
            now = self._clock()
            if turn > len(self._order):
                self._seconds[self._decoder(turn - 1).name].append((now - self._turn_began) / TURN)
            self._turn_began = now
        if turn == TURNS:
            return self._choose()
        self._batches += 1
        return self._decoder(turn)

    def _decoder(self, turn: int) -> Decoder:
        return self._order[turn % len(self._order)]

    def _choose(self) -> Decoder:
        cpu, dali = self._order
        on_cpu, by_dali = (statistics.median(self._seconds[decoder.name]) for decoder in self._order)
        self._chosen, self._loser = (dali, cpu) if by_dali < LEAD * on_cpu else (cpu, dali)
        log.info(
            "decode=auto: a batch took %.1f ms with %s, %.1f ms with %s, the training step included: %s decodes from "
            "here on",
            on_cpu * 1000, cpu.name, by_dali * 1000, dali.name, self._chosen.name,
        )  # fmt: skip
        return self._chosen

    def close(self) -> None:
        """See Decoder."""
        for decoder in self._order:
            decoder.close()
