"""Print the header of a bitstream as JSON. This needs no artifact.

Example:
  fairway compress --out texts.fwy README.md && fairway describe texts.fwy
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="F.fwy", help="a bitstream or a proof; - for stdin")


def run(options: argparse.Namespace) -> int:
    """Print the header."""
    from fairway.command_line import json_bytes
    from fairway.compression.pipes import read_piped_bitstream

    header, payload = read_piped_bitstream(options.file)
    description = header._asdict() | dict(
        artifact=header.artifact.hex(),
        digest=header.digest.hex(),
        made_on=str(header.made_on),
        payload_bytes=len(payload),
    )
    sys.stdout.buffer.write(json_bytes(description))
    return 0
