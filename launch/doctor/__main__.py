"""`python -m launch.doctor`: examines a cluster and its storage before a job starts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from launch.doctor import findings
from launch.doctor.examine import examine
from launch.doctor.findings import BAD
from runtime.errors import command
from runtime.program import as_started, command_line

EPILOG = """\
  python -m launch.doctor --hostfile HOSTS configs/pretrain.yaml data_root=s3://bucket output_dir=/shared/runs/first
  srun and sbatch: within a job, without --hostfile, it examines the job's nodes
  without either: this host alone

Run it where and as the job will be started, with the same settings. Exit code 1 when a problem must be fixed."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("launch.doctor"), description=as_started(__doc__), epilog=as_started(EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    result.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="the job's configuration; without it storage is not checked"
    )
    result.add_argument("settings", nargs="*", metavar="key=value", help="overrides of the job")
    result.add_argument("--hostfile", help="hostfile of deepspeed: one `node1 slots=8` per line")
    result.add_argument("--port", type=int, default=29500, help="rendezvous port (default: %(default)s)")
    result.add_argument("--least-gbit", type=float, default=1.0, help="minimum Gbit/s of a link (default: %(default)s)")
    result.add_argument(
        "--seconds", type=float, default=5.0, help="duration of the loader's measurement (default: %(default)s)"
    )
    result.add_argument("--trial-steps", type=int, default=0, help="real steps of the job to measure (default: none)")
    result.add_argument("--json", action="store_true", help="print the findings as JSON")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_intermixed_args(arguments)
    found = examine(options)
    if options.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=1) + "\n")
    else:
        sys.stdout.write(findings.table(found) + "\n")
    return int(any(finding.verdict == BAD for finding in found))


if __name__ == "__main__":
    sys.exit(main())
