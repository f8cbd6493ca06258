"""Family, parameters, layout, bytes a rank, dtypes and the largest tensors of a Hugging Face folder, of rank shards or
of training state. Reads headers only; with --tensor and --statistics also that one tensor.

example:
  megalite describe checkpoints/demo
  megalite describe checkpoints/demo --tensor model.embed_tokens.weight --statistics
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from megalite.convert.describe import describe, describe_tensor
from megalite.monitor.words import format_bytes
from megalite.tools.toolkit import Parser


def add_arguments(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--tensor", metavar="NAME", help="shape and dtype of one tensor, and where it lies")
    parser.add_argument("--statistics", action="store_true", help="with --tensor: read it, for mean, range and NaN")
    parser.add_argument("--all", action="store_true", help="list every tensor, not just the largest")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def lines(facts: dict[str, Any], shown: int) -> Iterator[str]:
    """The facts for people."""
    yield f"{facts['path']}: {facts['form']}"
    yield f"  family      {facts['family']} ({facts['architecture']}), {facts['layers']} layers"
    yield f"  parameters  {facts['parameters']:,}"
    if facts["quantization"]:
        yield f"  quantized   {facts['quantization']}"
    heads, experts = facts["heads"], facts["experts"]
    some = f"; {experts['per_token']} of {experts['count']} experts a token" if experts else ""
    wide = f"{heads['size']} wide, hidden size {facts['hidden_size']}"
    yield f"  heads       {heads['query']} query, {heads['key_value']} key/value, {wide}{some}"
    scaling = f", {facts['rope_scaling']} rope" if facts["rope_scaling"] else ""
    windows = "".join(f", window {window}" for window in facts["windows"])
    yield f"  context     {facts['context']:,} tokens{scaling}{windows}"
    tied = "head and embedding tied" if facts["tied_embeddings"] else "head and embedding apart"
    yield f"  vocabulary  {facts['vocabulary']:,}, {tied}"
    yield f"  tokenizer   {_tokenizer(facts)}"
    yield f"  ends with   {', '.join(map(_token, facts['end_tokens'])) or 'what the tokenizer says'}"
    if facts["sampling"]:
        yield "  sampling    " + ", ".join(f"{key}={value:g}" for key, value in facts["sampling"].items())
    yield f"  size        {format_bytes(facts['bytes'])}: " + ", ".join(
        f"{dtype} {format_bytes(count)}" for dtype, count in facts["dtypes"].items()
    )
    if facts["layout"]:
        kinds = ", ".join(facts["kinds"])
        sizes = ",".join(f"{key}={size}" for key, size in facts["layout"].items())
        yield f"  layout      {sizes}; stored: {kinds}"
    for key, value in facts["training"].items():
        yield f"  {key:10}  {value}"
    if facts["left_out"]:
        yield f"  left out    {', '.join(facts['left_out'][:3])} ({len(facts['left_out'])} tensors)"
    yield "  files"
    for file in facts["files"]:
        place = ""
        if "rank" in file:
            layers = ", ".join(f"{start}..{stop}" for start, stop in file["layers"])
            place = f"  tp {file['tp']}, pp {file['pp']}, layers {layers}"
        yield f"    {file['name']:32} {format_bytes(file['bytes']):>10}  {file['tensors']:5} tensors{place}"
    yield "  tensors"
    for tensor in facts["tensors"][:shown]:
        shape = " x ".join(map(str, tensor["shape"]))
        yield f"    {tensor['name']:56} {tensor['dtype']:5} {shape:>16}  {format_bytes(tensor['bytes']):>10}"
    if len(facts["tensors"]) > shown:
        yield f"    ... and {len(facts['tensors']) - shown} more (--all lists them)"
    for note in facts["notes"]:
        yield f"  note: {note}"


def _tokenizer(facts: dict[str, Any]) -> str:
    tokenizer = facts["tokenizer"]
    if tokenizer is None:
        return "none"
    if isinstance(tokenizer, str):
        return f"damaged: {tokenizer}"
    return f"{tokenizer:,} tokens, {'a' if facts['chat_template'] else 'no'} chat template"


def _token(token: dict[str, Any]) -> str:
    return f"{token['id']} {token['text']}" if token["text"] else str(token["id"])


def tensor_lines(facts: dict[str, Any]) -> Iterator[str]:
    """One tensor, for people."""
    if "ranks" in facts:
        yield facts["name"]
        for rank in facts["ranks"]:
            yield f"  {rank['file']}: {_shape(rank)}{_statistics(rank, '; ')}"
            for text in rank["ranges"]:
                yield f"    {text}"
        return
    yield f"{facts['name']}: {_shape(facts)}{_statistics(facts, chr(10) + '  ')}"
    for place in facts["places"]:
        yield f"  {place['file']}: {place['tensor']}: {place['range']}"


def _shape(facts: dict[str, Any]) -> str:
    return f"{' x '.join(map(str, facts['shape']))} {facts['dtype']}"


def _statistics(of: dict[str, Any], before: str) -> str:
    facts = of.get("statistics")
    if facts is None:
        return ""
    counts = f"{facts['zeros']} zeros, {facts['nan']} NaN, {facts['infinite']} infinite"
    if "mean" not in facts:
        return before + counts
    numbers = ", ".join(f"{key} {facts[key]:.6g}" for key in ("min", "max", "mean", "std"))
    return f"{before}{numbers}; {counts}"


def run(args: argparse.Namespace) -> int:
    if args.tensor:
        facts = describe_tensor(args.path, args.tensor, args.revision, statistics=args.statistics)
        text = "\n".join(tensor_lines(facts))
    else:
        facts = describe(args.path, args.revision)
        text = "\n".join(lines(facts, len(facts["tensors"]) if args.all else 12))
    print(json.dumps(facts, indent=2) if args.json else text)
    return 0
