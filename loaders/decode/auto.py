"""decode=auto on a GPU: measures both decoders while training starts, and keeps the faster one."""

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
TURNS = 8  # of both together; the first of each is not counted, because queues fill and kernels are compiled
LEAD = 0.97  # DALI must take less than this share of the time of the CPU path, which leaves the GPU to training


class AutoDecoder:
    """See loaders.decode.decoder.Decoder: two decoders in turns, then the faster one; the other is closed.

    The time from batch to batch is compared: training asks for batches as fast as it takes them, so it holds both the
    waiting and what the decoder slows the step down. It is the median over turns, because one of them may contain an
    evaluation or a checkpoint.
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
            if not self._drop_dali(decoder, error):
                raise
        finally:
            with self._lock:
                self._running[decoder.name] -= 1
                unused = self._loser if self._loser is not None and not self._running[self._loser.name] else None
                self._loser = None if unused is not None else self._loser
            if unused is not None:
                unused.close()
        return self._order[0].decode(clips)

    def _drop_dali(self, decoder: Decoder, error: RuntimeError) -> bool:
        """Whether the CPU path can continue after this error: DALI failed during the trial of both decoders.

        In most cases the GPU lacks the memory for DALI beside training. A broken device fails in the next training step
        as well.
        """
        cpu, dali = self._order
        with self._lock:
            if decoder is not dali or self._chosen is dali:
                return False
            if self._chosen is None:
                log.warning("decode=auto: switching to the CPU decoder, because %s", error)
                self._chosen, self._loser = cpu, dali
        return True

    def _next(self) -> Decoder:
        """The decoder of the next batch."""
        if self._chosen is not None:
            return self._chosen
        turn, number = divmod(self._batches, TURN)
        if number == 0:
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
            "decode=auto: a batch took %.1f ms with %s, %.1f ms with %s (training step included): "
            "%s was chosen",
            on_cpu * 1000, cpu.name, by_dali * 1000, dali.name, self._chosen.name,
        )  # fmt: skip
        return self._chosen

    def close(self) -> None:
        """See Decoder."""
        for decoder in self._order:
            decoder.close()
