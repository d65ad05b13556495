"""Checks that a GPU computes and decodes as the CPU does; each check prints one line of JSON.

    python benchmarks/gpu_check.py versions                      packages, GPU, driver
    python benchmarks/gpu_check.py losses --size base            losses and gradients of a fixed batch: CPU fp32 against
                                                                 fp32 and bf16 on the GPU, TF32 off
    python benchmarks/gpu_check.py pictures data/photos          DALI's pixels against the CPU's; and whether a batch
                                                                 is unchanged after later ones were decoded
    python benchmarks/gpu_check.py damaged data/photos           results for damaged images; may leave the GPU unusable
                                                                 for this process, so run it separately

Without a GPU each check runs on the CPU: `losses` compares bf16 with fp32, DALI runs its CPU graph. A damaged image
is `named` as bad, `shown` (the loader finds it by its CRC-32 before), or `harmed`: another image changed. Exit code 1
if something exceeds its tolerance, an image differs, or one is harmed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.decoding import LARGEST_MEAN, cpu_decoder, dali_decoder, deviation, read_clips
from benchmarks.model import SIZES, make_batch, ours
from launch.doctor.probe import Probe
from loaders.decode.decoder import Decoder
from loaders.samples import Clip
from model.singularity import Singularity
from runtime.ranks import cores_per_process
from train.job.devices import choose_kernels

SLEEP_CYCLES = 2_000_000_000  # about a second on the default stream
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Tolerance(NamedTuple):
    """Allowed relative deviation of losses and gradient norm from the CPU's, and of 1 - cosine of the gradients."""

    loss: float
    norm: float
    angle: float


TOLERANCES = {"fp32": Tolerance(1e-4, 1e-3, 1e-4), "bf16": Tolerance(0.02, 0.02, 0.005)}


def versions(options: argparse.Namespace) -> dict[str, Any]:
    """What results depend on: GPU, driver, CPU, packages."""
    return Probe().facts()


class Outcome(NamedTuple):
    """Losses and gradients of a step, on the CPU."""

    losses: dict[str, float]
    gradients: torch.Tensor  # of all parameters, one after another, float64


def outcome(options: argparse.Namespace, device: str, dtype: torch.dtype) -> Outcome:
    """One forward and backward pass without dropout, with given negatives and masked tokens."""
    torch.manual_seed(0)
    model = Singularity(SIZES[options.size]).eval().to(device, dtype)
    batch = make_batch(SIZES[options.size], options.batch, 1, 32, 13)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch["frames"] = batch["frames"].to(dtype)
    losses = ours(model, batch, given_words=True)
    torch.stack([loss.float() for loss in losses.values()]).sum().backward()
    gradients = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return Outcome({name: loss.item() for name, loss in losses.items()}, torch.cat(gradients))


def compare(found: Outcome, reference: Outcome, tolerance: Tolerance) -> dict[str, Any]:
    """Deviation of an outcome from the reference, and whether it is within the tolerance."""
    off = torch.tensor([abs(found.losses[name] / value - 1) for name, value in reference.losses.items()])
    loss = float(off.max())  # NaN where one of them is
    norm, expected = float(found.gradients.norm()), float(reference.gradients.norm())
    angle = 1 - float(torch.nn.functional.cosine_similarity(found.gradients, reference.gradients, dim=0))
    fine = loss <= tolerance.loss and abs(norm / expected - 1) <= tolerance.norm and angle <= tolerance.angle
    return {
        "losses": {name: round(value, 5) for name, value in found.losses.items()},
        "gradient_norm": round(norm, 5),
        "loss_off": f"{loss:.1e}",
        "norm_off": f"{abs(norm / expected - 1):.1e}",
        "1-cosine": f"{angle:.1e}",
        "ok": fine,
    }


def losses(options: argparse.Namespace) -> dict[str, Any]:
    """Losses and gradients of one batch on the CPU in fp32 and on the device in each precision."""
    choose_kernels(deterministic=False)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = outcome(options, "cpu", torch.float32)
    result: dict[str, Any] = {
        "device": device,
        "batch": options.batch,
        "cpu fp32": {name: round(value, 5) for name, value in reference.losses.items()},
        "cpu gradient_norm": round(float(reference.gradients.norm()), 5),
    }
    for name in DTYPES if device == "cuda" else ("bf16",):
        result[f"{device} {name}"] = compare(outcome(options, device, DTYPES[name]), reference, TOLERANCES[name])
    return result


def changed(frames: torch.Tensor, others: torch.Tensor) -> int:
    """Number of differing images (B, T, S, S, 3); a GPU may use its JPEG engine once and a kernel the next time."""
    return int(((frames.int() - others.int()).abs().float().flatten(1).mean(1) > LARGEST_MEAN).sum())


def race(decoder: Decoder, first: list[Clip], others: list[Clip], busy: Callable[[], None]) -> int:
    """Number of images of a batch that change while later ones are decoded and the device is `busy`."""
    quiet = decoder.decode(first)[0].cpu().clone()
    busy()
    shown = decoder.decode(first)[0]
    for _ in range(3):
        decoder.decode(others)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return changed(shown.cpu(), quiet)


def pictures(options: argparse.Namespace) -> dict[str, Any]:
    """DALI's pixels against the CPU's, also with a busy device."""
    clips = read_clips(options.corpus, options.images)
    batches = [clips[first : first + options.batch] for first in range(0, len(clips), options.batch)]
    if len(batches) < 2 or len(batches[-1]) < options.batch:
        batches = batches[:-1] if len(batches) > 2 else [clips[: len(clips) // 2], clips[len(clips) // 2 :]]
    threads = cores_per_process(1)
    dali, cpu = dali_decoder(options.pixels, threads, batches[0]), cpu_decoder(options.pixels, threads)
    grey = deviation(dali, cpu, batches)
    on_gpu = torch.cuda.is_available()
    busy = (lambda: torch.cuda._sleep(SLEEP_CYCLES)) if on_gpu else (lambda: None)
    lost = race(dali, batches[0], batches[1], busy)
    for decoder in (dali, cpu):
        decoder.close()
    return {
        "images": sum(map(len, batches)),
        "grey_levels": grey | {"ok": grey["mean"] <= LARGEST_MEAN},
        "race": {
            "changed": lost,
            "of": len(batches[0]),
            "device": "busy for a second" if on_gpu else "idle: no GPU",
            "ok": not lost,
        },
    }


def headless(data: bytes) -> bytes:
    """Header of a JPEG with almost none of its data."""
    return data[: data.index(b"\xff\xda") + 16]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "html": lambda data: b"<html>",
    "no picture": headless,
    "half": lambda data: data[: len(data) // 2],
    "half, with an end marker": lambda data: data[: len(data) // 2] + b"\xff\xd9",
    "no end marker": lambda data: data[:-2],
}


def survival(decoder: Decoder, batch: list[Clip], damage: Callable[[bytes], bytes]) -> str:
    """Result of a batch with one damaged image: `named`, `shown` or `harmed`."""
    good, middle = decoder.decode(batch)[0].clone(), len(batch) // 2
    others = [number for number in range(len(batch)) if number != middle]
    damaged = batch[middle]._replace(jpegs=[damage(data) for data in batch[middle].jpegs])
    frames, bad = decoder.decode([*batch[:middle], damaged, *batch[middle + 1 :]])
    again, bad_again = decoder.decode(batch)
    if changed(frames[others], good[others]) or changed(again, good) or bad_again or set(bad) - {middle}:
        return "harmed"
    return "named" if bad else "shown"


def damaged(options: argparse.Namespace) -> dict[str, Any]:
    """DALI's result for each kind of damage."""
    batch = read_clips(options.corpus, options.batch)
    decoder = dali_decoder(options.pixels, cores_per_process(1), batch)
    found = {name: survival(decoder, batch, damage) for name, damage in DAMAGES.items()}
    decoder.close()
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", "damaged": found}


def faults(found: Any) -> bool:
    """Whether a result exceeds its tolerance."""
    if isinstance(found, dict):
        return found.get("ok") is False or any(map(faults, found.values()))
    return found == "harmed"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = result.add_subparsers(required=True, metavar="CHECK")
    checks.add_parser("versions", help="what is installed").set_defaults(check=versions)
    of_losses = checks.add_parser("losses", help="the GPU's losses and gradients against the CPU's")
    of_losses.add_argument("--size", choices=SIZES, default="base", help="(default: %(default)s)")
    of_losses.add_argument("--batch", type=int, default=8, help="pairs (default: %(default)s)")
    of_losses.set_defaults(check=losses)
    for name, check in (("pictures", pictures), ("damaged", damaged)):
        of_pictures = checks.add_parser(name, help=check.__doc__)
        of_pictures.add_argument("corpus", metavar="URL", help="a packed corpus")
        of_pictures.add_argument("--pixels", type=int, default=224, help="of a picture (default: %(default)s)")
        of_pictures.add_argument("--batch", type=int, default=128, help="pictures at once (default: %(default)s)")
        of_pictures.add_argument("--images", type=int, default=512, help="at most (default: %(default)s)")
        of_pictures.set_defaults(check=check)
    return result


def main() -> int:
    options = parser().parse_args()
    found = options.check(options)
    print(json.dumps(found))
    return int(faults(found))


if __name__ == "__main__":
    sys.exit(main())
