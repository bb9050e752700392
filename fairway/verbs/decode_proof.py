"""Decode the proof of a score into a shard of tokens.

`eval_final.py --prove N` writes the proof: the first N tokens at the price that the score counts.
If they can be decoded from the artifact and this file alone, the score did not look ahead.

Example:
  eval_final.py --prove 2000 && fairway decode-proof eval/proof.fwy --out tokens.bin
"""

from __future__ import annotations

import argparse

from fairway.command_line import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="PROOF", help="eval/proof.fwy")
    parser.add_argument("--out", required=True, metavar="SHARD", help="the shard of its tokens")
    parser.add_argument("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="needed if the artifact holds none"
    )
    parser.add_argument(
        "--device", choices=("", "cpu", "cuda", "mps"), default="", help="default: the fastest here"
    )


def run(options: argparse.Namespace) -> int:
    """Write the shard, and print how many tokens it has."""
    from fairway.compression.bitstream import read_bitstream
    from fairway.compression.compressor import Compressor
    from fairway.compression.pipes import token_bar
    from fairway.shards import write_shard
    from train_gpt import UserError

    check_writable("--out", options.out)
    header, payload = read_bitstream(options.file)
    compressor = Compressor.load(options.artifact, options.device, options.tokenizer)
    try:
        with token_bar("decoding", header.count) as bar:
            tokens = compressor.decode_proof(header, payload, bar.update)
    except UserError as e:
        raise UserError(f"{options.file}: {e}") from None
    write_shard(options.out, tokens)
    print(f"{options.out}: {len(tokens)} tokens")
    return 0
