"""Tests of claude_shim, in the order of its sections.

Three rings: pure functions (most), an App on a scripted upstream, real sockets before a fake
upstream. Expected values are written out; nothing is patched, nothing sleeps, nothing leaves the
machine. A thread or a socket left over fails its test.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import gc
import gzip
import hashlib
import hmac
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import secrets
import select
import selectors
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import threading
import time
import tokenize
import urllib.parse
import urllib.request
import weakref
import zlib
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

import pytest

import claude_shim as shim

JSON = Dict[str, Any]


# ----------------------------------------------------------------------
# Tools of the tests
# ----------------------------------------------------------------------


def case(title: str, *values: Any) -> Any:
    """One row of a table of tests; the title is a sentence."""
    return pytest.param(*values, id=title)


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Fail a test that leaves a thread running; unclosed sockets fail as ResourceWarning."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(5.0)
    assert [thread.name for thread in left if thread.is_alive()] == []


def sse(*events: JSON) -> bytes:
    """The events as Anthropic sends them."""
    dumped = [json.dumps(event, separators=(",", ":"), ensure_ascii=False) for event in events]
    lines = (f"event: {e['type']}\ndata: {data}\n\n" for e, data in zip(events, dumped))
    return "".join(lines).encode()


def message_start(**message: Any) -> JSON:
    whole = {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-opus-5-5",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 25,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 1,
        },
    }
    return {"type": "message_start", "message": {**whole, **message}}


def block_start(index: int, **block: Any) -> JSON:
    return {"type": "content_block_start", "index": index, "content_block": block}


def block_delta(index: int, **delta: Any) -> JSON:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def text_delta(index: int, text: str) -> JSON:
    return block_delta(index, type="text_delta", text=text)


def json_delta(index: int, partial_json: str) -> JSON:
    return block_delta(index, type="input_json_delta", partial_json=partial_json)


def block_stop(index: int) -> JSON:
    return {"type": "content_block_stop", "index": index}


def message_delta(stop_reason: str, usage: Optional[JSON] = None, **delta: Any) -> JSON:
    change = {"stop_reason": stop_reason, "stop_sequence": None, **delta}
    return {"type": "message_delta", "delta": change, "usage": usage or {"output_tokens": 15}}


MESSAGE_STOP: JSON = {"type": "message_stop"}
PING: JSON = {"type": "ping"}

TEXT_EVENTS: List[JSON] = [
    message_start(),
    block_start(0, type="text", text=""),
    PING,
    text_delta(0, "Hel"),
    text_delta(0, "l\u00f6 \u4e16\U0001f600"),
    block_stop(0),
    message_delta("end_turn"),
    MESSAGE_STOP,
]


class ScriptedSource(shim.Source):
    """Plays bursts, then ends; an exception among them is raised. Records how it was let go."""

    def __init__(
        self,
        bursts: Iterable[Union[bytes, Exception]],
        upstream: Optional[shim.Upstream] = None,
    ) -> None:
        self._bursts = list(bursts)
        self.upstream = upstream or shim.Upstream()
        self.fate = "open"

    def read(self) -> bytes:
        if not self._bursts:
            return b""
        burst = self._bursts.pop(0)
        if isinstance(burst, Exception):
            raise burst
        return burst

    def close(self) -> None:
        self.fate = "closed"

    def drop(self) -> None:
        self.fate = "dropped"


Answer = Tuple[int, Dict[str, str], Sequence[Union[bytes, Exception]]]


def streamed(*events: JSON, **headers: str) -> Answer:
    """An answer of upstream: 200 with an event stream."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return (
        200,
        {"content-type": "text/event-stream", "request-id": "req_1", **named},
        [sse(*events)],
    )


def refused(status: int, type_: str, message: str, **headers: str) -> Answer:
    """An answer of upstream: an error."""
    body = {"type": "error", "error": {"type": type_, "message": message}, "request_id": "req_1"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return (
        status,
        {"content-type": "application/json", "request-id": "req_1", **named},
        [json.dumps(body).encode()],
    )


class ScriptedUpstream(shim.Upstream):
    """Plays one answer a request (the last one again and again) and records what it got."""

    url = "http://scripted"

    def __init__(self, *answers: Union[Answer, Exception]) -> None:
        self._answers = list(answers)
        self.requests: List[shim.UpstreamRequest] = []
        self.sources: List[ScriptedSource] = []

    def send(self, request: shim.UpstreamRequest) -> shim.UpstreamResponse:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, headers, bursts = answer
        source = ScriptedSource(bursts, self)
        self.sources.append(source)
        return shim.UpstreamResponse(status, list(headers.items()), source)

    def bodies(self) -> List[JSON]:
        """The bodies it got, parsed."""
        return [json.loads(request.body) for request in self.requests]


def app_on(*answers: Union[Answer, Exception], **policy: Any) -> Tuple[shim.App, ScriptedUpstream]:
    """An App before a scripted upstream; it asks for no model list and waits for no retry."""
    upstream = ScriptedUpstream(*answers)
    defaults = {"live_models": False, "retries": shim.RetryPolicy(0), "prompt_cache": "off"}
    key = shim.APIKey("sk-ant-api03-upstream", "the test")
    return shim.App(upstream, key, shim.Policy(**{**defaults, **policy})), upstream


def ask(app: shim.App, path: str, body: Any, **headers: str) -> shim.Response:
    """Post a body to an App."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return app.respond(shim.Request("POST", path, named, raw, "shim_1"))


def played(response: shim.Response) -> bytes:
    """All bytes of the body of a response, its stream pumped to the end."""
    if isinstance(response.body, shim.Stream):
        return b"".join(pumped(response.body))
    if isinstance(response.body, shim.Gathered):
        for stream in response.body.streams:
            list(pumped(stream))
        return played(response.body.response())
    return response.body


def pieces_and_resumptions(source: shim.Source) -> Iterator[bytes]:
    """A body with all that follows when its upstream is asked to go on."""
    upstream = getattr(getattr(source, "_source", source), "upstream", shim.Upstream())
    while True:
        yield from shim.pieces_of(source)
        again = source.resumption()
        if again is None:
            return
        shim.driven(again, upstream)


def pumped(stream: shim.Stream) -> Iterator[bytes]:
    """What the client gets of a stream, pulled to its end."""
    source, transform = stream
    try:
        for burst in pieces_and_resumptions(source):
            yield transform.feed(burst)
            if transform.complete or transform.failed:
                return
        yield transform.end()
    except shim.ShimError as error:
        yield transform.end(error)


def answered(response: shim.Response) -> JSON:
    """The JSON body of a response that is not streamed."""
    return json.loads(played(response))


def chunks(stream: bytes) -> List[Any]:
    """The data of server-sent events: parsed, [DONE] as text."""
    blocks = [block for block in stream.decode("ascii").split("\n\n") if block and block[0] != ":"]
    data = [
        "".join(line[6:] for line in b.split("\n") if line.startswith("data: ")) for b in blocks
    ]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


# ----------------------------------------------------------------------
# House rules: the helpers
# ----------------------------------------------------------------------

MODULE_FILE = Path(shim.__file__)
README_FILE = MODULE_FILE.with_name("README.md")

BANNER_RULE = "# " + "-" * 70
BANNER_TITLE = re.compile(r"# (\d+)\. (\S.*?) {2,}uses:(?: (nothing|none|-|\d+(?: \d+)*))?")
NEARLY_A_BANNER = re.compile(r"#\s*([-=#*])\1{9,}\s*|#\s*\d+\.\s.*\buses:.*")

PURE_SECTIONS = range(1, 8)
IO_NAMES = frozenset(
    """
    os sys time socket socketserver ssl threading _thread multiprocessing concurrent asyncio queue
    sched signal random secrets uuid select selectors subprocess shutil tempfile pathlib glob
    io.open io.open_code io.FileIO fileinput mmap fcntl msvcrt termios pty tty sqlite3 dbm shelve
    logging warnings getpass locale platform importlib runpy ctypes webbrowser configparser argparse
    urllib.request http.server http.client datetime.datetime.now datetime.datetime.utcnow
    datetime.datetime.today datetime.date.today
    open print input exec eval __import__ breakpoint
    """.split()
)

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler)

# Methods whose meaning the standard library documents, so that they need no docstring of their own.
INHERITED_METHODS = frozenset(
    """
    handle handle_one_request handle_error setup finish log_message log_request log_error
    server_bind server_activate server_close process_request shutdown_request verify_request
    get_request service_actions run format emit http_open https_open redirect_request
    """.split()
)


class Banner(NamedTuple):
    line: int
    number: int
    title: str
    uses: Tuple[int, ...]


class Reference(NamedTuple):
    """A name that the module (or builtins) must supply, and the attributes read off it."""

    name: str
    dotted: str
    line: int


def read_banners(lines: List[str]) -> Tuple[List[Banner], List[str]]:
    banners = []
    faults = []
    taken: Set[int] = set()
    for index, line in enumerate(lines):
        if index in taken or not NEARLY_A_BANNER.fullmatch(line):
            continue
        middle, last = [*lines[index + 1 : index + 3], "", ""][:2]
        title = BANNER_TITLE.fullmatch(middle)
        if line == last == BANNER_RULE and title:
            words = (title[3] or "").split()
            uses = tuple(int(word) for word in words if word.isdigit())
            banners.append(Banner(index + 1, int(title[1]), title[2], uses))
            taken.update((index, index + 1, index + 2))
        else:
            faults.append(f"line {index + 1}: not a section banner: {line} / {middle} / {last}")
    return banners, faults


def imported_names(statement: ast.AST) -> Iterator[Tuple[str, str]]:
    """Pairs of bound name and what it stands for: `import a.b as c` gives ("c", "a.b")."""
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            bound = alias.asname or alias.name.split(".")[0]
            yield bound, alias.name if alias.asname else bound
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name, f"{statement.module}.{alias.name}"


def bound_names(nodes: Iterable[ast.AST], in_class: bool = False) -> Iterator[Tuple[str, int]]:
    """The names that these nodes bind in the scope they stand in, each with its line."""
    for node in nodes:
        if isinstance(node, (*Function, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, (*Comprehension, ast.Lambda)):
            for inner in ast.walk(node):
                if isinstance(inner, ast.NamedExpr) and not isinstance(node, ast.Lambda):
                    yield inner.target.id, inner.lineno
        elif in_class and isinstance(node, ast.AnnAssign) and node.value is None:
            continue
        else:
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                yield node.id, node.lineno
            elif isinstance(node, ast.ExceptHandler) and node.name:
                yield node.name, node.lineno
            for name, _ in imported_names(node):
                yield name, getattr(node, "lineno", 0)
            yield from bound_names(ast.iter_child_nodes(node), in_class)


def declared_global(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Global):
            yield from node.names
        elif not isinstance(node, (*Function, ast.ClassDef, ast.Lambda)):
            yield from declared_global(ast.iter_child_nodes(node))


class Scope(NamedTuple):
    names: FrozenSet[str]
    global_names: FrozenSet[str] = frozenset()
    is_class: bool = False


class GlobalNames(ast.NodeVisitor):
    """Collects the references that no function, class or comprehension around them answers.

    Annotations are read too, string annotations included; the words inside `Literal[...]` are not.
    """

    def __init__(self, imports: Dict[str, str]) -> None:
        self.found: List[Reference] = []
        self._imports = imports
        self._scopes: List[Scope] = []
        self._in_annotation = False

    def _is_local(self, name: str) -> bool:
        for depth, scope in enumerate(reversed(self._scopes)):
            if scope.is_class and depth:
                continue
            if name in scope.names or name in scope.global_names:
                return name in scope.names
        return False

    def _visit_all(self, nodes: Iterable[Optional[ast.AST]]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def _visit_inside(self, scope: Scope, nodes: Iterable[ast.AST]) -> None:
        self._scopes.append(scope)
        self._visit_all(nodes)
        self._scopes.pop()

    def _visit_as_annotation(self, nodes: Iterable[Optional[ast.AST]], answer: bool = True) -> None:
        before, self._in_annotation = self._in_annotation, answer
        self._visit_all(nodes)
        self._in_annotation = before

    def _visit_function(self, node: Any) -> None:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
        self._visit_all([*arguments.defaults, *arguments.kw_defaults])
        self._visit_as_annotation(argument.annotation for argument in every)
        body = node.body if isinstance(node.body, list) else [node.body]
        outer_names = frozenset(declared_global(body))
        names = {name for name, _ in bound_names(body)} | {argument.arg for argument in every}
        self._visit_inside(Scope(frozenset(names) - outer_names, outer_names), body)

    def visit_FunctionDef(self, node: Any) -> None:
        self._visit_all(node.decorator_list)
        self._visit_as_annotation([node.returns])
        self._visit_function(node)

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = _visit_function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all([*node.decorator_list, *node.bases])
        self._visit_all(keyword.value for keyword in node.keywords)
        names = frozenset(name for name, _ in bound_names(node.body, in_class=True))
        self._visit_inside(Scope(names, is_class=True), node.body)

    def _visit_comprehension(self, node: Any) -> None:
        first = node.generators[0]
        self.visit(first.iter)
        targets = [generator.target for generator in node.generators]
        inside = [condition for generator in node.generators for condition in generator.ifs]
        inside += [generator.iter for generator in node.generators[1:]]
        inside += [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self._visit_inside(Scope(frozenset(name for name, _ in bound_names(targets))), inside)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        # `usage: Usage` in a class binds nothing and names no other `usage`.
        declares_only = isinstance(node.target, ast.Name) and node.value is None
        self._visit_all([None if declares_only else node.target, node.value])
        self._visit_as_annotation([node.annotation])

    def visit_Subscript(self, node: ast.Subscript) -> None:
        meaning = self.resolve(dotted_name(node.value))
        typed = self._in_annotation or meaning.startswith(("typing.", "collections.abc."))
        typed = typed or meaning in ("dict", "list", "tuple", "set", "frozenset", "type")
        self.visit(node.value)
        self._visit_as_annotation([node.slice], typed and not meaning.endswith("Literal"))

    def visit_Constant(self, node: ast.Constant) -> None:
        if self._in_annotation and isinstance(node.value, str):
            expression = ast.parse(node.value, mode="eval").body
            for inner in ast.walk(expression):
                if hasattr(inner, "lineno"):
                    inner.lineno = node.lineno
            self.visit(expression)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        dotted = dotted_name(node)
        if not dotted:
            self.generic_visit(node)
        elif not self._is_local(dotted.split(".")[0]):
            self.found.append(Reference(dotted.split(".")[0], dotted, node.lineno))

    def visit_Name(self, node: ast.Name) -> None:
        defines = not self._scopes and not isinstance(node.ctx, ast.Load)
        if not defines and not self._is_local(node.id):
            self.found.append(Reference(node.id, node.id, node.lineno))

    def resolve(self, dotted: str) -> str:
        """`t.Dict` after `import typing as t` is "typing.Dict"."""
        root, dot, rest = dotted.partition(".")
        return self._imports.get(root, root) + dot + rest


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` for such an expression, "" for any other."""
    if isinstance(node, ast.Attribute):
        inner = dotted_name(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def code_line_numbers(source: str) -> Set[int]:
    """The lines that hold more than a comment."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    numbers: Set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            numbers.update(range(token.start[0], token.end[0] + 1))
    return numbers


class House:
    """One module's source, read once."""

    def __init__(self, source: str) -> None:
        self.lines = source.split("\n")
        self.tree = ast.parse(source)
        self.banners, self.banner_faults = read_banners(self.lines)
        self.code_lines = code_line_numbers(source)
        self.uses = {banner.number: banner.uses for banner in self.banners}
        self.imports: Dict[str, str] = {}
        for statement in self.module_statements(self.tree):
            self.imports.update(imported_names(statement))
            if isinstance(statement, ast.Assign) and dotted_name(statement.value):
                root, dot, rest = dotted_name(statement.value).partition(".")
                for target in statement.targets:
                    whole = self.imports.get(root, root) + dot + rest
                    self.imports[dotted_name(target)] = whole
        names = GlobalNames(self.imports)
        names.visit(self.tree)
        self.references = names.found
        self.resolve = names.resolve
        self.definitions: Dict[str, Set[int]] = {}
        for name, line in bound_names(self.tree.body):
            self.definitions.setdefault(name, set()).add(self.section_at(line))

    def section_at(self, line: int) -> int:
        return max([banner.number for banner in self.banners if banner.line <= line], default=0)

    def module_statements(self, node: ast.AST) -> Iterator[ast.AST]:
        """The statements of a body, those under `if` and `try` included."""
        for child in ast.iter_child_nodes(node):
            yield child
            if isinstance(child, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
                yield from self.module_statements(child)

    def uses_found(self) -> Dict[int, Dict[int, str]]:
        """For each section the others that it names, with one "name (line n)" as evidence."""
        found: Dict[int, Dict[int, str]] = {number: {} for number in (0, *self.uses)}
        for reference in self.references:
            here = self.section_at(reference.line)
            for there in self.definitions.get(reference.name, set()) - {here}:
                found[here].setdefault(there, f"{reference.name} (line {reference.line})")
        return found

    def functions(self) -> Iterator[Tuple[str, Any]]:
        """Each function and method, nested ones too, with its dotted name."""
        return self._functions_below(self.tree, "")

    def _functions_below(self, node: ast.AST, prefix: str) -> Iterator[Tuple[str, Any]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*Function, ast.ClassDef)):
                if isinstance(child, Function):
                    yield f"{prefix}{child.name} (line {child.lineno})", child
                yield from self._functions_below(child, f"{prefix}{child.name}.")
            else:
                yield from self._functions_below(child, prefix)

    def length(self, function: Any) -> int:
        """Lines from `def` to the end without docstring, comment-only and blank lines."""
        numbers = self.code_lines & set(range(function.lineno, function.end_lineno + 1))
        if ast.get_docstring(function, clean=False) is not None:
            docstring = function.body[0]
            numbers -= set(range(docstring.lineno, docstring.end_lineno + 1))
        return len(numbers)

    def lengths(self) -> List[int]:
        return sorted(self.length(function) for _, function in self.functions())

    def public_definitions(self) -> Iterator[Tuple[str, Any]]:
        """The module's public classes and functions and the public methods of those classes."""
        for name, node in self._definitions_with_methods():
            if not any(part.startswith("_") for part in name.split(".")):
                yield name, node

    def _definitions_with_methods(self) -> Iterator[Tuple[str, Any]]:
        for node in self.module_statements(self.tree):
            if isinstance(node, (*Function, ast.ClassDef)):
                yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in self.module_statements(node):
                    if isinstance(inner, Function):
                        yield f"{node.name}.{inner.name}", inner

    def documented_above(self, class_name: str, method: str) -> bool:
        """Whether a base class in this module has the method with a docstring."""
        for node in self.module_statements(self.tree):
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                for base in map(dotted_name, node.bases):
                    if method in self._documented_methods(base) or self.documented_above(
                        base, method
                    ):
                        return True
        return False

    def _documented_methods(self, class_name: str) -> Set[str]:
        return {
            name.partition(".")[2]
            for name, node in self._definitions_with_methods()
            if name.startswith(f"{class_name}.") and ast.get_docstring(node)
        }

    def modules_imported(self) -> Iterator[Tuple[int, str]]:
        """Line and dotted name of everything imported anywhere; `from a import b` gives a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{package}.{alias.name}") for alias in node.names)


def nesting(node: ast.AST) -> int:
    """How deep if, for, while, with and try stand in each other; `elif` does not nest."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = (
            isinstance(node, ast.If)
            and isinstance(child, ast.If)
            and child in node.orelse
            and child.col_offset == node.col_offset
        )
        adds = isinstance(child, NESTING) and not is_elif
        deepest = max(deepest, nesting(child) + adds)
    return deepest


def branches(function: ast.AST) -> int:
    """if, elif, for, while and except; no boolean operators, conditional expressions."""
    return sum(isinstance(node, BRANCHES) for node in ast.walk(function))


def parameters(function: Any) -> List[str]:
    """All parameters, starred ones too, without self and cls."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg]
    every += [*arguments.kwonlyargs, arguments.kwarg]
    names = [argument.arg for argument in every if argument]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def needs_no_docstring(name: str, node: Any) -> bool:
    """Protocol methods, and the second halves of properties and overloads."""
    method = name.rpartition(".")[2]
    marks = {dotted_name(mark).rpartition(".")[2] for mark in getattr(node, "decorator_list", [])}
    is_method = "." in name
    inherited = is_method and (method.startswith("do_") or method in INHERITED_METHODS)
    return inherited or bool(marks & {"setter", "deleter", "overload"})


def is_io(dotted: str) -> bool:
    parts = dotted.split(".")
    return any(".".join(parts[:end]) in IO_NAMES for end in range(1, len(parts) + 1))


def over(limit: int, measure: Callable[[Any], int]) -> List[str]:
    measured = [(name, measure(function)) for name, function in HOUSE.functions()]
    return [f"{name}: {count}, limit {limit}" for name, count in measured if count > limit]


def readme_table(name: str, readme: Optional[str] = None) -> List[List[str]]:
    """The rows below the heading of the README table of that name, cells without backticks."""
    text = README_FILE.read_text(encoding="utf-8") if readme is None else readme
    found = re.findall(rf"<!-- table: {re.escape(name)} -->\n(.*?)<!-- /table -->", text, re.DOTALL)
    assert len(found) == 1, f"README.md has {len(found)} tables called {name}"
    lines = [line.strip() for line in found[0].splitlines() if line.strip()]
    strays = [line for line in lines if not (line.startswith("|") and line.endswith("|"))]
    assert not strays, f"lines in table {name} which are no table rows: {strays}"
    cells = [re.split(r"(?<!\\)\|", line[1:-1]) for line in lines]
    rows = [[cell.replace("\\|", "|").replace("`", "").strip() for cell in row] for row in cells]
    assert len(rows) > 2, f"table {name} has no rows"
    assert all(re.fullmatch(r":?-+:?", cell) for cell in rows[1]), f"table {name} has no heading"
    assert len({len(row) for row in rows}) == 1, f"rows of table {name} differ in length"
    return rows[2:]


def report(findings: Iterable[Any]) -> str:
    """The findings one a line: pytest shortens lists."""
    return "\n" + "\n".join(str(finding) for finding in findings)


HOUSE = House(MODULE_FILE.read_text(encoding="utf-8"))

# ----------------------------------------------------------------------
# House rules: sections, layers, purity
# ----------------------------------------------------------------------


def test_every_section_opens_with_a_banner_of_one_form() -> None:
    assert not HOUSE.banner_faults, report(HOUSE.banner_faults)
    assert HOUSE.banners, "no section banner found"


def test_section_numbers_ascend() -> None:
    numbers = [0] + [banner.number for banner in HOUSE.banners]
    assert numbers == sorted(set(numbers))


def test_a_house_rule_of_one_to_three_lines_stands_below_every_banner() -> None:
    wrong = []
    for banner in HOUSE.banners:
        below = HOUSE.lines[banner.line + 2 :]
        while below and not below[0]:
            below = below[1:]
        count = next((n for n, line in enumerate(below) if not line.startswith("#")), len(below))
        if not 1 <= count <= 3:
            wrong.append(f"{banner.number}. {banner.title}: {count} lines")
    assert not wrong, report(wrong)


def test_a_section_may_use_only_sections_above_it() -> None:
    existing = {0, *HOUSE.uses}
    wrong = [
        f"{banner.number}. {banner.title} uses {used}"
        for banner in HOUSE.banners
        for used in banner.uses
        if used >= banner.number or used not in existing
    ]
    assert not wrong, report(wrong)
    assert [b.number for b in HOUSE.banners if list(b.uses) != sorted(set(b.uses))] == []


def test_a_section_uses_only_what_its_banner_lists() -> None:
    wrong = [
        f"section {here} uses {there}: {evidence}"
        for here, found in HOUSE.uses_found().items()
        for there, evidence in found.items()
        if there != 0 and there not in HOUSE.uses.get(here, ())
    ]
    assert not wrong, report(wrong)


def test_a_banner_lists_only_what_its_section_uses() -> None:
    found = HOUSE.uses_found()
    stale = [
        f"{banner.number}. {banner.title} lists {used}"
        for banner in HOUSE.banners
        for used in banner.uses
        if used not in found[banner.number]
    ]
    assert not stale, report(stale)


def test_a_name_is_defined_in_one_section_only() -> None:
    twice = {name: places for name, places in HOUSE.definitions.items() if len(places) > 1}
    assert not twice, report(twice.items())


def test_the_pure_sections_name_no_clock_file_socket_thread_or_chance() -> None:
    named = [(ref.line, HOUSE.resolve(ref.dotted)) for ref in HOUSE.references]
    named += list(HOUSE.modules_imported())
    wrong = [
        f"line {line}: {dotted}"
        for line, dotted in sorted(named)
        if is_io(dotted) and HOUSE.section_at(line) in PURE_SECTIONS
    ]
    assert not wrong, report(wrong)


# ----------------------------------------------------------------------
# House rules: budgets
# ----------------------------------------------------------------------


def test_the_file_has_at_most_12970_lines() -> None:
    lines = len(HOUSE.lines) - 1
    assert lines <= 12970


def test_no_function_is_longer_than_50_lines() -> None:
    wrong = over(50, HOUSE.length)
    assert not wrong, report(wrong)


def test_nine_functions_in_ten_have_at_most_30_lines() -> None:
    lengths = HOUSE.lengths()
    assert lengths[math.ceil(len(lengths) * 0.9) - 1] <= 30


def test_half_of_the_functions_have_at_most_9_lines() -> None:
    assert statistics.median(HOUSE.lengths()) <= 9


def test_no_function_nests_deeper_than_3() -> None:
    wrong = over(3, nesting)
    assert not wrong, report(wrong)


def test_no_function_has_more_than_12_branches() -> None:
    wrong = over(12, branches)
    assert not wrong, report(wrong)


def test_no_function_has_more_than_5_parameters() -> None:
    wrong = over(5, lambda function: len(parameters(function)))
    assert not wrong, report(wrong)


# ----------------------------------------------------------------------
# House rules: the public face
# ----------------------------------------------------------------------


def test_every_public_name_has_a_docstring() -> None:
    bare = [
        f"{name} (line {node.lineno})"
        for name, node in HOUSE.public_definitions()
        if not needs_no_docstring(name, node)
        and not ast.get_docstring(node)
        and not HOUSE.documented_above(*name.rpartition(".")[::2])
    ]
    assert not bare, report(bare)
    assert ast.get_docstring(HOUSE.tree), "the module has no docstring"


def test_every_exported_name_exists_and_is_public() -> None:
    exported = list(shim.__all__)
    assert [name for name in exported if name not in HOUSE.definitions] == []
    assert [name for name in exported if not hasattr(shim, name)] == []
    assert [name for name in exported if re.match(r"_(?!_version__$)", name)] == []
    assert len(exported) == len(set(exported))


# Python 3.9 has no sys.stdlib_module_names; these are the names of 3.10 that 3.13 still knows.
STDLIB_MODULES = frozenset(
    getattr(sys, "stdlib_module_names", ())
    or """
    __future__ abc argparse array ast asyncio atexit base64 bdb binascii bisect builtins bz2
    cProfile calendar cmath cmd code codecs codeop collections colorsys compileall
    concurrent configparser contextlib contextvars copy copyreg csv ctypes curses
    dataclasses datetime dbm decimal difflib dis doctest email encodings ensurepip enum
    errno faulthandler fcntl filecmp fileinput fnmatch fractions ftplib functools gc
    genericpath getopt getpass gettext glob graphlib grp gzip hashlib heapq hmac html http
    imaplib importlib inspect io ipaddress itertools json keyword linecache locale logging
    lzma mailbox marshal math mimetypes mmap modulefinder msvcrt multiprocessing netrc nt
    ntpath nturl2path numbers opcode operator optparse os pathlib pdb pickle pickletools
    pkgutil platform plistlib poplib posix posixpath pprint profile pstats pty pwd
    py_compile pyclbr pydoc pydoc_data pyexpat queue quopri random re readline reprlib
    resource rlcompleter runpy sched secrets select selectors shelve shlex shutil signal
    site smtplib socket socketserver sqlite3 sre_compile sre_constants sre_parse ssl stat
    statistics string stringprep struct subprocess symtable sys sysconfig syslog tabnanny
    tarfile tempfile termios textwrap threading time timeit tkinter token tokenize trace
    traceback tracemalloc tty turtle types typing unicodedata unittest urllib uuid venv
    warnings wave weakref webbrowser winreg winsound wsgiref xml xmlrpc zipapp zipfile
    zipimport zlib zoneinfo
    """.split()
)


def test_only_the_standard_library_is_imported() -> None:
    foreign = [
        f"line {line}: {dotted}"
        for line, dotted in HOUSE.modules_imported()
        if dotted.split(".")[0] not in STDLIB_MODULES
    ]
    assert not foreign, report(foreign)


# ----------------------------------------------------------------------
# House rules: tables
# ----------------------------------------------------------------------

# openai 3.52.0, openai/types/chat/completion_create_params.py: the keys of
# CompletionCreateParamsBase in its order, and the `stream` of its two heirs.
OPENAI_3_52_CHAT_FIELDS = tuple(
    """
    messages model audio frequency_penalty function_call functions logit_bias logprobs
    max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls prediction
    presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort
    response_format safety_identifier seed service_tier stop store stream stream_options temperature
    tool_choice tools top_logprobs top_p user verbosity web_search_options
    """.split()
)


# openai 3.52.0, openai/types/responses/response_create_params.py: the keys of
# ResponseCreateParamsBase in its order, and the `stream` of its two heirs.
OPENAI_3_52_RESPONSES_FIELDS = tuple(
    """
    access_programs background context_management conversation image include input instructions
    max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls
    previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention
    reasoning safety_identifier service_tier store stream_options temperature text tool_choice tools
    top_logprobs top_p truncation user stream
    """.split()
)


def responses_tables() -> Dict[str, List[str]]:
    return {
        "RESPONSES_REQUEST": list(shim.RESPONSES_REQUEST),
        "RESPONSES_IGNORED": list(shim.RESPONSES_IGNORED),
        "RESPONSES_REJECTED": list(shim.RESPONSES_REJECTED),
    }


@pytest.mark.parametrize("field", OPENAI_3_52_RESPONSES_FIELDS)
def test_a_published_responses_field_is_mapped_ignored_or_rejected(field: str) -> None:
    homes = [table for table, fields in responses_tables().items() if field in fields]
    assert len(homes) == 1, f"{field} is in {homes or 'no table'}"


def test_no_responses_field_is_in_two_tables() -> None:
    every = sorted(field for fields in responses_tables().values() for field in fields)
    assert every == sorted(set(every))


def chat_tables() -> Dict[str, List[str]]:
    return {
        "CHAT_REQUEST": list(shim.CHAT_REQUEST),
        "CHAT_IGNORED": list(shim.CHAT_IGNORED),
        "CHAT_REJECTED": list(shim.CHAT_REJECTED),
    }


@pytest.mark.parametrize("field", OPENAI_3_52_CHAT_FIELDS)
def test_a_published_chat_field_is_mapped_ignored_or_rejected(field: str) -> None:
    homes = [table for table, fields in chat_tables().items() if field in fields]
    assert len(homes) == 1, f"{field} is in {homes or 'no table'}"


def test_no_chat_field_is_in_two_tables() -> None:
    every = sorted(field for fields in chat_tables().values() for field in fields)
    assert every == sorted(set(every))


# ----------------------------------------------------------------------
# House rules: the README's tables are the code's
# ----------------------------------------------------------------------


def chat_rows(table: Any) -> List[List[str]]:
    """Field and explanation; where the table holds more, the explanation comes first."""
    return [[field, told if isinstance(told, str) else told[0]] for field, told in table.items()]


def expected_readme_rows() -> Dict[str, List[List[str]]]:
    return {
        "chat-mapped": chat_rows(shim.CHAT_REQUEST),
        "chat-ignored": chat_rows(shim.CHAT_IGNORED),
        "chat-rejected": chat_rows(shim.CHAT_REJECTED),
        "credentials": [
            [mode, kind.name, kind.given, kind.payer]
            for mode, kind in shim.KINDS.items()
            if mode in shim.AUTH_MODES
        ],
        "responses-mapped": chat_rows(shim.RESPONSES_REQUEST),
        "responses-ignored": chat_rows(shim.RESPONSES_IGNORED),
        "responses-rejected": chat_rows(shim.RESPONSES_REJECTED),
        "commands": [
            [
                " ".join([name, *(f"[--{s}]" for s in command.switches)]),
                command.help,
                command.exit_codes,
            ]
            for name, command in shim.COMMANDS.items()
        ],
        "options": [
            [f"--{option.flag} {option.metavar}".strip(), option.default, option.help]
            for option in shim.OPTIONS
        ],
        "endpoints": [
            [route.path, ", ".join(route.methods), route.summary] for route in shim.ROUTES
        ],
    }


@pytest.mark.parametrize("name", sorted(expected_readme_rows()))
def test_a_table_of_the_readme_says_what_the_code_says(name: str) -> None:
    expected = [[cell.replace("`", "") for cell in row] for row in expected_readme_rows()[name]]
    assert readme_table(name) == expected


def test_every_table_of_the_readme_is_checked() -> None:
    names = re.findall(r"<!-- table: (\S+) -->", README_FILE.read_text(encoding="utf-8"))
    assert sorted(names) == sorted(expected_readme_rows())


# ----------------------------------------------------------------------
# 1. Errors
# ----------------------------------------------------------------------

# Message, our error, then what an OpenAI client gets: status, type, param, code.
OPENAI_ERROR_ROWS = [
    case(
        "a wrong field is a 400 that names it",
        shim.RequestError("expected a list, got 5", param="messages"),
        (400, "invalid_request_error", "messages", None),
    ),
    case(
        "a missing client key is a 401",
        shim.AuthenticationError("no key"),
        (401, "invalid_request_error", None, "invalid_api_key"),
    ),
    case(
        "a forbidden host is a 403",
        shim.ForbiddenError("not from here"),
        (403, "invalid_request_error", None, "permission_denied"),
    ),
    case(
        "S3-B30: an unknown endpoint is a 404 in the envelope",
        shim.NotFoundError("no such endpoint"),
        (404, "invalid_request_error", None, "unsupported_endpoint"),
    ),
    case(
        "S2-F9, S4-B18: an unknown model is a 404, not another model",
        shim.ModelNotFoundError("no such model", param="model"),
        (404, "invalid_request_error", "model", "model_not_found"),
    ),
    case(
        "a wrong method is a 405",
        shim.MethodNotAllowedError("not so"),
        (405, "invalid_request_error", None, None),
    ),
    case(
        "a body over the limit is a 413",
        shim.RequestTooLargeError("too much"),
        (413, "invalid_request_error", None, "request_too_large"),
    ),
    case(
        "a compressed body is a 415",
        shim.UnsupportedEncodingError("gzip"),
        (415, "invalid_request_error", None, None),
    ),
    case(
        "S2-B5: an upstream that cannot be reached is a 502",
        shim.UpstreamUnreachableError("no route"),
        (502, "server_error", None, None),
    ),
    case("a cut answer is a 502", shim.UpstreamCutError("cut"), (502, "server_error", None, None)),
    case(
        "S4-B26: a silent upstream is a 504, not a 408 that clients repeat",
        shim.UpstreamTimeoutError("silence"),
        (504, "server_error", None, "timeout"),
    ),
    case(
        "S3-B14: upstream's 401 stays a 401",
        shim.UpstreamError("invalid x-api-key", status=401, type="authentication_error"),
        (401, "invalid_request_error", None, "invalid_api_key"),
    ),
    case(
        "an account that cannot pay looks like OpenAI's empty account",
        shim.UpstreamError("pay first", status=402, type="billing_error"),
        (429, "insufficient_quota", None, "insufficient_quota"),
    ),
    case(
        "too low a credit balance is the empty account too",
        shim.UpstreamError(
            "Your credit balance is too low to access the Anthropic API.",
            status=400,
            type="invalid_request_error",
        ),
        (429, "insufficient_quota", None, "insufficient_quota"),
    ),
    case(
        "a spent limit of one's own is the empty account too",
        shim.UpstreamError(
            "You have reached your specified API usage limits.",
            status=400,
            type="invalid_request_error",
        ),
        (429, "insufficient_quota", None, "insufficient_quota"),
    ),
    case(
        "upstream's 403 stays a 403",
        shim.UpstreamError("not allowed", status=403, type="permission_error"),
        (403, "invalid_request_error", None, "permission_denied"),
    ),
    case(
        "a model that upstream does not have is model_not_found",
        shim.UpstreamError("model: claude-x", status=404, type="not_found_error"),
        (404, "invalid_request_error", "model", "model_not_found"),
    ),
    case(
        "another thing that upstream does not have is not_found",
        shim.UpstreamError("no such file", status=404, type="not_found_error"),
        (404, "invalid_request_error", None, "not_found"),
    ),
    case(
        "a conflict keeps its status",
        shim.UpstreamError("twice", status=409, type="conflict_error"),
        (409, "invalid_request_error", None, None),
    ),
    case(
        "upstream's 413 stays a 413",
        shim.UpstreamError("too large", status=413, type="request_too_large"),
        (413, "invalid_request_error", None, "request_too_large"),
    ),
    case(
        "S3-B14: upstream's 429 stays a 429",
        shim.UpstreamError("slower", status=429, type="rate_limit_error"),
        (429, "rate_limit_error", None, "rate_limit_exceeded"),
    ),
    case(
        "upstream's 500 stays a 500",
        shim.UpstreamError("oh", status=500, type="api_error"),
        (500, "server_error", None, None),
    ),
    case(
        "529 is unknown to OpenAI's clients: 503 server_is_overloaded",
        shim.UpstreamError("Overloaded", status=529, type="overloaded_error"),
        (503, "server_error", None, "server_is_overloaded"),
    ),
    case(
        "a failure of no known kind is a 500",
        shim.ShimError("oh"),
        (500, "server_error", None, None),
    ),
]


@pytest.mark.parametrize(("error", "expected"), OPENAI_ERROR_ROWS)
def test_error_for_openai_clients(error: shim.ShimError, expected: Tuple[Any, ...]) -> None:
    status, type_, param, code = expected
    known_by = "Incorrect API key provided: " if status == 401 else ""  # to LiteLLM
    detail = {"message": known_by + error.message, "type": type_, "param": param, "code": code}
    assert shim.openai_error(error) == (status, {"error": detail})


@pytest.mark.parametrize(
    "message",
    [
        case("too long a prompt", "prompt is too long: 210000 tokens > 200000 maximum"),
        case(
            "prompt and answer together",
            "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
        ),
    ],
)
def test_full_context_says_what_clients_look_for(message: str) -> None:
    error = shim.UpstreamError(message, status=400, type="invalid_request_error")
    status, body = shim.openai_error(error)
    told = body["error"].pop("message")
    assert (status, body) == (
        400,
        {
            "error": {
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        },
    )
    assert told.startswith(message)
    assert "prompt is too long" in told
    assert "maximum context length" in told


ANTHROPIC_ERROR_ROWS = [
    case(
        "a wrong field stands before the sentence",
        shim.RequestError("expected a list", param="messages.2.content"),
        400,
        "invalid_request_error",
        "messages.2.content: expected a list",
    ),
    case("a key", shim.AuthenticationError("no key"), 401, "authentication_error", "no key"),
    case("a host", shim.ForbiddenError("no host"), 403, "permission_error", "no host"),
    case("an endpoint", shim.NotFoundError("no path"), 404, "not_found_error", "no path"),
    case("a size", shim.RequestTooLargeError("big"), 413, "request_too_large", "big"),
    case("a cut", shim.UpstreamCutError("cut"), 502, "api_error", "cut"),
    case("a silence", shim.UpstreamTimeoutError("mute"), 504, "timeout_error", "mute"),
    case(
        "529 is known to Anthropic's clients",
        shim.UpstreamError("Overloaded", status=529, type="overloaded_error"),
        529,
        "overloaded_error",
        "Overloaded",
    ),
]


@pytest.mark.parametrize(("error", "status", "type_", "message"), ANTHROPIC_ERROR_ROWS)
def test_error_for_anthropic_clients(
    error: shim.ShimError, status: int, type_: str, message: str
) -> None:
    body = {"type": "error", "error": {"type": type_, "message": message}}
    assert shim.anthropic_error(error) == (status, body)
    assert shim.anthropic_error(error, "req_7") == (status, {**body, "request_id": "req_7"})


def test_s4_b27_no_error_has_a_type_that_anthropic_does_not_know() -> None:
    known = {
        "invalid_request_error",
        "authentication_error",
        "billing_error",
        "permission_error",
        "not_found_error",
        "conflict_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
        "timeout_error",
        "overloaded_error",
    }
    kinds = [shim.ShimError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
        assert kind.type in known, kind
        assert 400 <= kind.status <= 599, kind
    assert len(kinds) > 15


@pytest.mark.parametrize(
    ("status", "body", "type_", "message"),
    [
        case(
            "S3-B14: upstream's own type and sentence",
            429,
            {"type": "error", "error": {"type": "rate_limit_error", "message": "Slower."}},
            "rate_limit_error",
            "Slower.",
        ),
        case(
            "a type that is new",
            418,
            {"type": "error", "error": {"type": "teapot_error", "message": "I"}},
            "teapot_error",
            "I",
        ),
        case(
            "a 413 of Cloudflare is no JSON",
            413,
            None,
            "request_too_large",
            "upstream answered with status 413",
        ),
        case("an empty object", 529, {}, "overloaded_error", "upstream answered with status 529"),
        case("no object", 500, ["oh"], "api_error", "upstream answered with status 500"),
        case(
            "an error that is text",
            503,
            {"error": "x"},
            "api_error",
            "upstream answered with status 503",
        ),
        case(
            "members of other types",
            401,
            {"error": {"type": 5, "message": {"a": 1}}},
            "authentication_error",
            "upstream answered with status 401",
        ),
    ],
)
def test_error_of_an_answer(status: int, body: Any, type_: str, message: str) -> None:
    error = shim.upstream_error(status, body, [("retry-after", "7")])
    told = (error.status, error.type, error.message, error.headers)
    assert told == (status, type_, message, [("retry-after", "7")])


@pytest.mark.parametrize(
    ("type_", "status"),
    [
        case("a wrong request", "invalid_request_error", 400),
        case("a wrong key", "authentication_error", 401),
        case("an empty account", "billing_error", 402),
        case("a forbidden thing", "permission_error", 403),
        case("a missing thing", "not_found_error", 404),
        case("a conflict", "conflict_error", 409),
        case("too large a request", "request_too_large", 413),
        case("too many requests", "rate_limit_error", 429),
        case("a fault", "api_error", 500),
        case("a silence", "timeout_error", 504),
        case("an overload", "overloaded_error", 529),
        case("a type to come", "unheard_of_error", 500),
    ],
)
def test_error_of_an_event_has_the_status_of_its_type(type_: str, status: int) -> None:
    event = {"type": "error", "error": {"type": type_, "message": "It failed."}}
    error = shim.error_from_event(event)
    assert (error.status, error.type, error.message) == (status, type_, "It failed.")


@pytest.mark.parametrize("detail", [None, "text", 5, [], {"type": [1], "message": None}])
def test_error_of_an_event_without_form_is_a_500(detail: Any) -> None:
    error = shim.error_from_event({"type": "error", "error": detail})
    assert (error.status, error.type) == (500, "api_error")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        case("a page", "https://a.example/login?token=hunter2#hunter2", "https://a.example"),
        case("a host alone", "http://a.example", "http://a.example"),
        case("a port", "http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
        case("an address of version 6", "https://[::1]:8443/x", "https://[::1]:8443"),
        case("a query at once", "https://a.example?hunter2", "https://a.example"),
        case("a user and password are not shown", "https://me:hunter2@a.example/", "another page"),
        case("a user is not shown", "https://hunter2@a.example/", "another page"),
        case("another path", "/v2/hunter2", "another page"),
        case("another scheme", "javascript:hunter2", "another page"),
        case("a broken host", "http://[hunter2\r\n", "another page"),
        case("an endless host", f"http://{'a' * 300}/", "another page"),
        case("none", "", "another page"),
    ],
)
def test_redirect_is_named_without_what_may_be_secret(location: str, expected: str) -> None:
    assert shim.redirect_target([("server", "x"), ("location", location)]) == expected


# ----------------------------------------------------------------------
# 2. JSON
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        case("no white space", {"a": [1, {"b": None}]}, b'{"a":[1,{"b":null}]}'),
        case("characters beyond ASCII as escapes", "\u00e9\u4e16", b'"\\u00e9\\u4e16"'),
        case("an astral character as a pair", "\U0001f600", b'"\\ud83d\\ude00"'),
        case("line separators as escapes", "\u2028\u2029\x85", b'"\\u2028\\u2029\\u0085"'),
        case("half a pair as it is", "\ud83d", b'"\\ud83d"'),
        case("control characters", "\x00\n\x1f", b'"\\u0000\\n\\u001f"'),
        case("the order is kept", {"b": 1, "a": 2}, b'{"b":1,"a":2}'),
    ],
)
def test_dumps(value: Any, expected: bytes) -> None:
    assert shim.dumps(value) == expected


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_dumps_refuses_what_is_no_json(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        shim.dumps([number])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        case("a byte order mark", b'\xef\xbb\xbf{"a":1}', {"a": 1}),
        case("white space around it", b' \t\r\n{"a" : 1}\n', {"a": 1}),
        case("UTF-8", b'"\xc3\xa9\xf0\x9f\x98\x80"', "\u00e9\U0001f600"),
        case("a pair of escapes is one character", b'"\\ud83d\\ude00"', "\U0001f600"),
        case("the first half of a pair becomes U+FFFD", b'"a\\ud83db"', "a\ufffdb"),
        case("the second half of a pair becomes U+FFFD", b'"a\\uDE00b"', "a\ufffdb"),
        case("halves in the wrong order", b'"\\ude00\\ud83d"', "\ufffd\ufffd"),
        case("half a pair in a key", b'{"\\ud83d":["\\udc00"]}', {"\ufffd": ["\ufffd"]}),
        case("a backslash before u is no escape", b'"\\\\ud83d"', "\\ud83d"),
        case("a small number", b"1e-999", 0.0),
        case("a large whole number", b"1" + b"0" * 30, 10**30),
        case("a whole number as large as a double", b"-" + b"9" * 307, -(10**307 - 1)),
        case("a name that comes twice: the last one counts", b'{"a":1,"a":2}', {"a": 2}),
        case("brackets in text are no depth", b'["' + b"[{" * 5000 + b'"]', ["[{" * 5000]),
        case("many lists side by side", b"[" + b"[]," * 999 + b"[]]", [[]] * 1000),
    ],
)
def test_loads(text: bytes, expected: Any) -> None:
    assert shim.loads(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        case("nothing", b"", "Expecting value"),
        case("half an object", b'{"a":', "Expecting value"),
        case("two values", b"{} {}", "Extra data"),
        case("a comma too many", b"[1,]", ""),
        case("a raw control character", b'"a\nb"', "Invalid control character"),
        case("single quotes", b"{'a':1}", "Expecting property name"),
        case("NaN", b"[NaN]", "NaN is not JSON"),
        case("infinity", b"[-Infinity]", "-Infinity is not JSON"),
        case("too large a number", b"[1e999]", "the number 1e999 is too large"),
        case("too small a number", b"-1e999", "the number -1e999 is too large"),
        case("309 digits", b"9" * 309, f"the number {'9' * 20}... is too large"),
        case("a million digits", b"[1" + b"0" * 10**6 + b"]", f"{'0' * 19}... is too large"),
        case("not UTF-8", b'"\xff"', "codec can't decode"),
        case("a surrogate in UTF-8", b'"\xed\xa0\x80"', "codec can't decode"),
        case("UTF-16", '{"a":1}'.encode("utf-16"), "codec can't decode"),
    ],
)
def test_loads_refuses_what_is_no_json(text: bytes, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        shim.loads(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("opening", "closing", "times"),
    [
        case("lists", b"[", b"]", 200),
        case("objects", b'{"a":', b"}", 200),
        case("both", b'[{"a":', b"}]", 100),
    ],
)
def test_loads_takes_200_levels_and_no_more(opening: bytes, closing: bytes, times: int) -> None:
    body = opening * times + b"1" + closing * times
    shim.loads(body)
    with pytest.raises(ValueError, match="nested deeper than 200 levels"):
        shim.loads(b"[" + body + b"]")


@pytest.mark.parametrize(
    "body",
    [
        case("lists", b"[" * 100_000),
        case("objects", b'{"a":' * 100_000),
        case("behind brackets in strings", b'["' + b"]" * 70_000 + b'",' + b"[" * 300),
        case("behind escaped quotes", b'["' + b'\\\\\\"' * 30_000 + b'",' + b"[" * 300),
        case("behind escaped backslashes", b'["' + b"\\\\" * 40_000 + b'",' + b"[" * 300),
        case("without UTF-8", b"[" * 100_000 + b"\xff"),
    ],
)
def test_loads_survives_many_levels(body: bytes) -> None:
    with pytest.raises(ValueError, match="nested deeper than 200 levels"):
        shim.loads(body)


@pytest.mark.parametrize(
    ("opening", "part", "closing"),
    [
        case("lists", b"[[]", b",[]", b"]"),
        case("objects", b"[{}", b",{}", b"]"),
        case("numbers", b"[0", b",1,2", b"]"),
        case("members", b'{"":0', b',"a":1,"b":2', b"}"),
        case("strings", b'[""', b',"[",","', b"]"),
        case("the end of lists", b"[[0]", b",[0]", b"]"),
    ],
)
def test_loads_takes_half_a_million_values_and_no_more(
    opening: bytes, part: bytes, closing: bytes
) -> None:
    shim.loads(opening + part * 249_999 + closing)
    with pytest.raises(ValueError, match="it has more than 500000 values"):
        shim.loads(opening + part * 250_000 + closing)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        case("commas and brackets", b"[{,", "[{,"),
        case("escaped quotes", b'\\",[{', '",[{'),
        case("escaped backslashes", b"\\\\,[", "\\,["),
        case("both", b'\\\\\\"[,', '\\"[,'),
    ],
)
def test_what_stands_in_strings_is_no_value(text: bytes, expected: str) -> None:
    times = 200_000
    assert shim.loads(b'[["' + text * times + b'"],1]') == [[expected * times], 1]


@pytest.mark.parametrize(
    "body",
    [
        case("escaped quotes", b"[" * 100 + b"," * 101 + b'"' + b'\\"' * 10**6),
        case("quotes", b"[" * 201 + b'"' * (10**6 + 1)),
        case("backslashes", b"[" * 100 + b"," * 101 + b'"' + b"\\" * 10**6),
    ],
)
def test_string_without_an_end_takes_no_quadratic_time(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):  # 80 KB of these once took 25 s
        shim.loads(body)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        case("S3-B20: no JSON", b"{", "the request body cannot be read as JSON: Expecting "),
        case(
            "too deep",
            b"[" * 201,
            "the request body cannot be read as JSON: nested deeper than 200 levels",
        ),
        case("no UTF-8", b'{"a":"\xff"}', "the request body is not UTF-8"),
        case("a list", b"[]", "expected an object, got a list"),
        case("null", b"null", "expected an object, got null"),
        case("text", b'"x"', "expected an object, got a string"),
        case("a number", b"5", "expected an object, got 5"),
        case("a boolean", b"true", "expected an object, got true"),
    ],
)
def test_request_body_that_is_no_object(body: bytes, sentence: str) -> None:
    with pytest.raises(shim.RequestError) as caught:
        shim.loads_object(body)
    assert caught.value.message.startswith(sentence)


def test_request_body_that_is_an_object() -> None:
    assert shim.loads_object(b' {"a": [1]}') == {"a": [1]}


# --- long strings go around the parser and the encoder

# What a JSON text may be made of, well formed or not, where a string over eight bytes is long.
TEXT_PIECES = [
    b'"iVBORw0KGgoAAAA+/w=="', b'"data:image/png;base64,iVBORw0KGgoAAAA"', b'"-_.,:;-_.,:;"',
    b'"AAAAAAAA"', b'"AAAAAAAAA"', b'"-Infinity"', b'"AAAAAA-InfinityA"', b"-Infinity", b"Infinity",
    b"NaN", b'"AAAAAAAAAA\\/AAAA"', b'"AAAAAAAAAA\\nAAAA"', b'"AAAAAAAAAA AAAA"',
    b'"AAAAAAAAAA\nAAAA"', b'"AAAAAAAAAA\x00AAAA"', b'"AAAAAAAAAA\x7fAAAA"',
    b'"AAAAAAAAAA\xffAAAA"', b'"AAAAAAAAAA\xc3\xa9AAAA"', b'"AAAAAAAAAA\\u00e9AAAA"',
    b'"\\ud83dAAAAAAAAAAAAAA"', b'"\\ud83d\\ude00"', b'"{\\"data\\":\\"AAAAAAAAAAAAAAAA\\"}"',
    b'"AAAAAAAAAAAAA\\\\"', b'"a"', b'""', b'"[{"', b'"\\""', b"1", b"-1.5e3", b"1e999", b"9" * 309,
    b"1.0000000000000000", b"1,2,3,4,5,6,7,8,9,10,11", b"true", b"null", b" ", b"\n", b"\\", b'"',
    b'"url":"AAAAAAAAAAAAAAAA"', b'{"AAAAAAAAAAAAAAAA":1}', b'{"a":"AAAAAAAAAAAA","a":2}',
]  # fmt: skip


def random_text(chance: random.Random, depth: int) -> bytes:
    """A JSON text, or nearly one: lists and objects of the pieces above."""
    if not depth or chance.random() < 0.3:
        return chance.choice(TEXT_PIECES)
    parts = [random_text(chance, depth - 1) for _ in range(chance.randrange(4))]
    if chance.random() < 0.5:
        return b"[" + b",".join(parts) + b"]"
    return b"{" + b",".join(b'"%d":%b' % pair for pair in enumerate(parts)) + b"}"


def mutilated(text: bytes, chance: random.Random) -> bytes:
    """`text` with a part of it gone or in another place."""
    start, end = sorted(chance.randrange(len(text) + 1) for _ in range(2))
    place = chance.randrange(start + 1)
    moved = chance.choice([b"", text[start:end], chance.choice(TEXT_PIECES)])
    return text[:place] + moved + text[place:start] + text[end:]


def loaded(text: bytes, long: int) -> str:
    """The value, with its types, or the reason that there is none."""
    try:
        return repr(shim.loads(text, long))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def test_strings_around_the_parser_are_the_same_as_parsed_ones() -> None:
    chance = random.Random(1)
    values = 0
    for _ in range(6000):
        text = random_text(chance, 4)
        text = mutilated(text, chance) if chance.random() < 0.3 else text
        parsed = loaded(text, long=len(text))
        assert loaded(text, long=8) == parsed, text
        values += not re.match("[A-Za-z]+Error:", parsed)
    assert 1500 < values < 4500  # both kinds were met


@pytest.mark.parametrize(
    "strange", [b"", b"\x00", b"\n", b"\xc3\xa9", b"\\n", b"\\/", b'\\"', b" "]
)
@pytest.mark.parametrize("place", [0, 1, 65_535, 65_536, 131_072, 199_999, 200_000])
def test_all_of_a_long_string_is_looked_at(strange: bytes, place: int) -> None:
    text = b"A" * place + strange + b"A" * (200_000 - place)
    body = b'{"a":["' + text + b'"]}'
    assert loaded(body, shim.LONG_STRING) == loaded(body, len(body))


@pytest.mark.parametrize(
    ("value", "strings", "expected"),
    [
        case("no hole", ["a"], [], b'["a"]'),
        case("one", {"a": "\x7f"}, ["iVBO+/=="], b'{"a":"iVBO+/=="}'),
        case("several, in turn", ["\x7f", "-", "\x7f"], ["A", "B"], b'["A","-","B"]'),
        case("one that is empty", ["\x7f"], [""], b'[""]'),
        case("one with escapes", ["\x7f"], ['a\n"\\b'], b'["a\\n\\"\\\\b"]'),
        case("one beyond ASCII", ["\x7f"], ["\u00e9\U0001f600"], b'["\\u00e9\\ud83d\\ude00"]'),
        case("one that is a hole itself", ["\x7f"], ["\x7f"], b'["\\u007f"]'),
        case("a hole that is none", ["\x7f", "\x7f"], ["A"], None),
        case("text that looks like one", ['"\x7f', "\x7f"], ["A"], None),
    ],
)
def test_dumps_around(value: Any, strings: List[str], expected: Optional[bytes]) -> None:
    assert shim.dumps_around(value, strings) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        case("the only member", b'{"model":"x"}', b'{"model":"new"}'),
        case(
            "white space, order and numbers stay as they are",
            b'{ "a" : 1.50e+02 ,\n\t"model" : "x" , "b":[ ] }',
            b'{ "a" : 1.50e+02 ,\n\t"model" : "new" , "b":[ ] }',
        ),
        case(
            "members further in stay as they are",
            b'{"m":[{"model":"x"}],"model":"x","o":{"model":"x"}}',
            b'{"m":[{"model":"x"}],"model":"new","o":{"model":"x"}}',
        ),
        case(
            "the same words in text stay as they are",
            b'{"t":"\\"model\\":\\"x\\"","model":"x"}',
            b'{"t":"\\"model\\":\\"x\\"","model":"new"}',
        ),
        case(
            "escapes and characters stay as they are",
            b'{"t":"\\ud83d \\u00e9 \xc3\xa9 \\/","model":"x"}',
            b'{"t":"\\ud83d \\u00e9 \xc3\xa9 \\/","model":"new"}',
        ),
        case("an escaped name", b'{"mod\\u0065l":"x"}', b'{"mod\\u0065l":"new"}'),
        case("a name that comes twice", b'{"model":1,"model":2}', b'{"model":"new","model":"new"}'),
        case("a value that is an object", b'{"model":{"a":[1]},"b":2}', b'{"model":"new","b":2}'),
        case("a byte order mark goes", b'\xef\xbb\xbf {"model":"x"}\n', b' {"model":"new"}\n'),
    ],
)
def test_with_member_changes_one_value_only(body: bytes, expected: bytes) -> None:
    assert shim.with_member(body, "model", "new") == expected


def test_with_member_writes_ascii() -> None:
    assert shim.with_member(b'{"a":1}', "a", "\u00e9") == b'{"a":"\\u00e9"}'


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        case("an object", shim.as_object, {"a": 1}, {"a": 1}),
        case("a list", shim.as_list, [], []),
        case("text", shim.as_text, "", ""),
        case("a boolean", shim.as_boolean, False, False),
        case("a whole number", shim.as_number, 0, 0),
        case("a fraction", shim.as_number, -0.5, -0.5),
        case("a count", shim.as_positive_integer, 7, 7),
        case("a count as JavaScript writes it", shim.as_positive_integer, 7.0, 7),
    ],
)
def test_checked_access_gives_the_value(check: Any, value: Any, expected: Any) -> None:
    given = check(value, "a.b")
    assert given == expected
    assert type(given) is type(expected)


@pytest.mark.parametrize(
    ("check", "value", "sentence"),
    [
        case("a list for an object", shim.as_object, [], "expected an object, got a list"),
        case("null for an object", shim.as_object, None, "expected an object, got null"),
        case("an object for a list", shim.as_list, {}, "expected a list, got an object"),
        case("text for a list", shim.as_list, "ab", "expected a list, got a string"),
        case("a number for text", shim.as_text, 5, "expected a string, got 5"),
        case("one for a boolean", shim.as_boolean, 1, "expected a boolean, got 1"),
        case("text for a boolean", shim.as_boolean, "true", "expected a boolean, got a string"),
        case("a boolean for a number", shim.as_number, True, "expected a number, got true"),
        case("text for a number", shim.as_number, "1", "expected a number, got a string"),
        case(
            "zero for a count",
            shim.as_positive_integer,
            0,
            "expected a whole number over zero, got 0",
        ),
        case(
            "a boolean for a count",
            shim.as_positive_integer,
            True,
            "expected a whole number over zero, got true",
        ),
        case(
            "a fraction for a count",
            shim.as_positive_integer,
            1.5,
            "expected a whole number over zero, got 1.5",
        ),
        case(
            "less than zero for a count",
            shim.as_positive_integer,
            -1.0,
            "expected a whole number over zero, got -1",
        ),
    ],
)
def test_checked_access_names_the_path(check: Any, value: Any, sentence: str) -> None:
    with pytest.raises(shim.RequestError) as caught:
        check(value, "messages.2.content")
    assert (caught.value.param, caught.value.message) == ("messages.2.content", sentence)


# ----------------------------------------------------------------------
# 3. Models
# ----------------------------------------------------------------------

FIVE = "low medium high xhigh max"
TAKEN: Dict[str, Tuple[str, str, str]] = {
    # id: thinking types, effort levels, and what else is not a 400 (thinks: unless told not to)
    "claude-opus-5-5": ("adaptive", FIVE, "thinks system"),
    "claude-opus-5": ("adaptive disabled", FIVE, "thinks system forced"),
    "claude-opus-4-8": ("adaptive disabled", FIVE, "system forced"),
    "claude-opus-4-7": ("adaptive disabled", FIVE, "forced"),
    "claude-opus-4-6": ("adaptive disabled enabled", "low medium high max", "forced sampling"),
    "claude-opus-4-5": ("disabled enabled", "low medium high", "forced sampling prefill"),
    "claude-sonnet-5-5": ("adaptive between_tools", FIVE, "thinks system"),
    "claude-sonnet-5": ("adaptive disabled", FIVE, "thinks forced"),
    "claude-sonnet-4-6": ("adaptive disabled enabled", "low medium high max", "forced sampling"),
    "claude-sonnet-4-5": ("disabled enabled", "", "forced sampling prefill"),
    "claude-haiku-5-5": ("adaptive disabled", FIVE, "thinks system forced"),
    "claude-haiku-4-5": ("disabled enabled", "", "forced sampling prefill"),
    "claude-fable-5-2": ("adaptive", FIVE, "thinks system"),
    "claude-fable-5-1": ("adaptive", FIVE, "thinks system"),
    "claude-fable-5": ("adaptive", FIVE, "thinks system forced"),
    "claude-mythos-5-2": ("adaptive", FIVE, "thinks system"),
    "claude-mythos-5-1": ("adaptive", FIVE, "thinks system"),
    "claude-mythos-5": ("adaptive", FIVE, "thinks system forced"),
}


@pytest.mark.parametrize("id", list(TAKEN))
def test_model_takes_what_anthropic_says(id: str) -> None:
    model = shim.known_model(id)
    flags = {
        "thinks": model.thinks_by_default,
        "system": model.system_messages,
        "forced": model.forced_tool_choice,
        "sampling": model.sampling,
        "prefill": model.prefill,
    }
    thinking, efforts, others = TAKEN[id]
    assert model.id == id
    assert model.thinking == set(thinking.split())
    assert model.efforts == tuple(efforts.split())
    assert {name for name, taken in flags.items() if taken} == set(others.split())


def test_table_has_the_models_of_anthropic_and_no_others() -> None:
    assert {model.id for model in shim.MODELS} == set(TAKEN)


@pytest.mark.parametrize(
    ("id", "window", "answer"),
    [
        case("a model of today", "claude-sonnet-5-5", 1_000_000, 128_000),
        case("an older Opus", "claude-opus-4-5", 200_000, 64_000),
        case("an older Haiku with its date", "claude-haiku-4-5-20251001", 200_000, 64_000),
    ],
)
def test_model_limits(id: str, window: int, answer: int) -> None:
    model = shim.known_model(id)
    assert (model.id, model.max_input_tokens, model.max_tokens) == (id, window, answer)


@pytest.mark.parametrize(
    ("id", "like"),
    [
        case("a dated id is its model", "claude-opus-4-5-20251101", "claude-opus-4-5"),
        case("a coming Opus is like the newest", "claude-opus-7", "claude-opus-5-5"),
        case("a coming Sonnet is like the newest", "claude-sonnet-6-20270101", "claude-sonnet-5-5"),
        case("a coming Haiku is like the newest", "claude-haiku-6", "claude-haiku-5-5"),
        case("a preview of Mythos", "claude-mythos-preview", "claude-mythos-5-2"),
        case("a line that is new", "claude-saga-1", "claude-opus-5-5"),
    ],
)
def test_unknown_model_is_like_the_newest_of_its_line(id: str, like: str) -> None:
    assert shim.known_model(id) == shim.known_model(like)._replace(id=id)


LIVE_SONNET: JSON = {
    "type": "model",
    "id": "claude-sonnet-5-5",
    "display_name": "Claude Sonnet 5.5",
    "created_at": "2026-10-01T00:00:00Z",
    "max_input_tokens": 900_000,
    "max_tokens": 100_000,
    "capabilities": {
        "structured_outputs": {"supported": False},
        "effort": {
            "supported": True,
            "low": {"supported": True},
            "medium": {"supported": True},
            "high": {"supported": False},
        },
        "thinking": {
            "supported": True,
            "types": {
                "adaptive": {"supported": True},
                "enabled": {"supported": False},
                "disabled": {"supported": True},
            },
        },
    },
}


def test_live_entry_has_the_last_word() -> None:
    before = copy.deepcopy(LIVE_SONNET)
    assert shim.model_from_live(LIVE_SONNET) == shim.Model(
        id="claude-sonnet-5-5",
        max_input_tokens=900_000,
        max_tokens=100_000,
        thinking=frozenset({"adaptive", "disabled"}),
        efforts=("low", "medium"),
        thinks_by_default=True,
        forced_tool_choice=False,
        system_messages=True,
        off_up_to_high=True,
        sampling=False,
        prefill=False,
        structured_outputs=False,
        strict_tools=True,
        display_name="Claude Sonnet 5.5",
        created=1_790_812_800,
    )
    assert before == LIVE_SONNET


@pytest.mark.parametrize(
    "entry",
    [
        case("an entry of nothing but its id", {}),
        case("no capabilities", {"capabilities": None}),
        case("capabilities of a wrong type", {"capabilities": [1]}),
        case("empty capabilities", {"capabilities": {"thinking": {}, "effort": {}}}),
        case("thinking without types", {"capabilities": {"thinking": {"supported": True}}}),
        case("limits of wrong types", {"max_tokens": "many", "max_input_tokens": -1}),
        case("a time that is none", {"created_at": "yesterday"}),
    ],
)
def test_live_entry_that_says_little_leaves_the_table(entry: JSON) -> None:
    model = shim.model_from_live({"id": "claude-opus-4-6", **entry})
    assert model == shim.known_model("claude-opus-4-6")


@pytest.mark.parametrize("id", [None, 5, ["claude"]])
def test_live_entry_without_id_is_none(id: Any) -> None:
    assert shim.model_from_live({"id": id}) is None


def live_model(id: str, created: int) -> shim.Model:
    return shim.known_model(id)._replace(created=created)


LIVE = (
    live_model("claude-opus-5", 1_780_000_000),
    live_model("claude-opus-6", 1_800_000_000),
    live_model("claude-sonnet-5-5", 1_790_000_000),
)
PINNED = {"opus": "claude-opus-4-8", "gpt-4o*": "sonnet", "o3": "opus", "mine": "claude-haiku-4-5"}


@pytest.mark.parametrize(
    ("name", "aliases", "live", "expected"),
    [
        case("an id is itself", "claude-opus-4-8", {}, (), "claude-opus-4-8"),
        case(
            "a dated id is itself", "claude-opus-4-5-20251101", {}, (), "claude-opus-4-5-20251101"
        ),
        case("an unknown Claude id is itself", "claude-opus-9", {}, (), "claude-opus-9"),
        case("an id with dots", "claude-opus-4.6", {}, (), "claude-opus-4-6"),
        case("white space around it", " claude-opus-5 ", {}, (), "claude-opus-5"),
        case("S2-R4: a prefix goes", "openai/claude-opus-5", {}, (), "claude-opus-5"),
        case("the way of OpenRouter", "anthropic/claude-sonnet-4.5", {}, (), "claude-sonnet-4-5"),
        case("a prefix with a colon", "anthropic:claude-opus-5", {}, (), "claude-opus-5"),
        case("a prefix of ours", "claude-shim/haiku", {}, (), "claude-haiku-5-5"),
        case("the line opus, offline", "opus", {}, (), "claude-opus-5-5"),
        case("the line sonnet, offline", "sonnet", {}, (), "claude-sonnet-5-5"),
        case("the line haiku, offline", "haiku", {}, (), "claude-haiku-5-5"),
        case("the latest of a line", "claude-sonnet-latest", {}, (), "claude-sonnet-5-5"),
        case("a line by its full name", "claude-haiku", {}, (), "claude-haiku-5-5"),
        case("a line follows upstream's newest", "opus", {}, LIVE, "claude-opus-6"),
        case("a line that upstream has not", "haiku", {}, LIVE, "claude-haiku-5-5"),
        case("S2-F12: a line can be pinned", "opus", PINNED, LIVE, "claude-opus-4-8"),
        case("all names of a pinned line", "claude-opus-latest", PINNED, LIVE, "claude-opus-4-8"),
        case("an alias", "mine", PINNED, (), "claude-haiku-4-5"),
        case("an alias behind a prefix", "openai/mine", PINNED, (), "claude-haiku-4-5"),
        case("a glob to a line", "gpt-4o-mini", PINNED, (), "claude-sonnet-5-5"),
        case("an alias to a pinned line", "o3", PINNED, (), "claude-opus-4-8"),
        case("an id that only upstream knows", "next-1", {}, (live_model("next-1", 5),), "next-1"),
        case(
            "a line pinned to another line",
            "claude-opus-latest",
            {"opus": "sonnet"},
            (),
            "claude-sonnet-5-5",
        ),
        case(
            "an alias may be a claude name",
            "claude-x",
            {"claude-x": "haiku"},
            (),
            "claude-haiku-5-5",
        ),
    ],
)
def test_resolved_model_id(
    name: str, aliases: Dict[str, str], live: Sequence[shim.Model], expected: str
) -> None:
    assert shim.resolved_model_id(name, aliases, live) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("gpt-4o", "o3", "", "sonnets", "deepseek-chat"),
        *("gpt-4o" * 99, "claude-" * 99, " " * 256 + "opus", "all" * 99),
    ],
)
def test_s2_f9_s4_b18_other_models_are_not_found(name: str) -> None:
    with pytest.raises(shim.ModelNotFoundError) as caught:
        shim.resolved_model_id(name, {"mine": "opus", "all*": "opus"}, LIVE)
    error = caught.value
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    for known in ("opus", "sonnet", "haiku", "mine", "claude-opus-6", f"'{name[:100]}'"):
        assert known in error.message
    assert "claude-opus-4-8" not in error.message  # upstream's list, not ours
    assert len(error.message) < 1000


def test_model_entry_serves_both_dialects() -> None:
    model = shim.model_from_live(LIVE_SONNET)
    assert model is not None
    entry = shim.model_entry(model, {})
    assert entry == {
        "id": "claude-sonnet-5-5",
        "type": "model",
        "object": "model",
        "display_name": "Claude Sonnet 5.5",
        "created": 1_790_812_800,
        "created_at": "2026-10-01T00:00:00Z",
        "owned_by": "anthropic",
        "max_input_tokens": 900_000,
        "max_tokens": 100_000,
        "context_length": 900_000,
        "max_model_len": 900_000,
        "max_output_tokens": 100_000,
        "capabilities": {
            "image_input": {"supported": True},
            "pdf_input": {"supported": True},
            "structured_outputs": {"supported": False},
            "thinking": {
                "supported": True,
                "types": {"adaptive": {"supported": True}, "disabled": {"supported": True}},
            },
            "effort": {
                "supported": True,
                "low": {"supported": True},
                "medium": {"supported": True},
            },
        },
        "architecture": {
            "input_modalities": ["text", "image", "file"],
            "output_modalities": ["text"],
        },
        "supported_parameters": ["tools", "tool_choice", "reasoning", "response_format", "stop"],
    }


def test_model_entry_of_a_model_that_is_only_in_the_table() -> None:
    entry = shim.model_entry(shim.known_model("claude-haiku-4-5"), {})
    told_of = {name: entry[name] for name in ("display_name", "created", "created_at")}
    assert told_of == {
        "display_name": "claude-haiku-4-5",
        "created": 0,
        "created_at": "1970-01-01T00:00:00Z",
    }
    assert entry["capabilities"]["effort"] == {"supported": False}


def test_model_entry_keeps_what_upstream_says() -> None:
    model = shim.model_from_live(LIVE_SONNET)
    assert model is not None
    entry = shim.model_entry(model, {**LIVE_SONNET, "line": "sonnet"})
    assert entry["capabilities"] == LIVE_SONNET["capabilities"]
    assert (entry["line"], entry["object"], entry["created"]) == ("sonnet", "model", 1_790_812_800)


@pytest.mark.parametrize(
    ("entries", "first", "last"),
    [
        case("no model", [], None, None),
        case("one model", [{"id": "a"}], "a", "a"),
        case("three models", [{"id": "a"}, {"id": "b"}, {"id": "c"}], "a", "c"),
    ],
)
def test_model_list(entries: List[JSON], first: Optional[str], last: Optional[str]) -> None:
    page = {"has_more": False, "first_id": first, "last_id": last}
    told = shim.model_list(entries)
    slugs = [entry["slug"] for entry in told.pop("models")]
    assert told == {"object": "list", "data": entries, **page}
    assert slugs == [entry["id"] for entry in entries]


# What Codex 0.169 was found to need of an entry, by leaving each member out (wire/openai.md 5).
CODEX_NEEDS: Dict[str, type] = {
    "slug": str,
    "display_name": str,
    "supported_reasoning_levels": list,
    "shell_type": str,
    "visibility": str,
    "supported_in_api": bool,
    "priority": int,
    "base_instructions": str,
    "support_verbosity": bool,
    "truncation_policy": dict,
    "experimental_supported_tools": list,
    "context_window": int,
}


@pytest.mark.parametrize("live", [{}, {"max_input_tokens": None, "display_name": None}])
@pytest.mark.parametrize("model", shim.MODELS, ids=lambda model: model.id)
def test_codex_finds_what_it_needs_of_each_model(model: shim.Model, live: JSON) -> None:
    entry = shim.model_list([shim.model_entry(model, live)])["models"][0]
    assert {name: type(entry.get(name)) for name in CODEX_NEEDS} == CODEX_NEEDS
    assert all(map(entry["supported_reasoning_levels"][0].get, ("effort", "description")))


def test_codex_is_offered_the_efforts_that_a_model_has() -> None:
    told = shim.model_list(
        [
            shim.model_entry(shim.known_model(id), {})
            for id in ("claude-opus-5-5", "claude-haiku-4-5")
        ]
    )
    efforts = [
        [level["effort"] for level in entry["supported_reasoning_levels"]]
        for entry in told["models"]
    ]
    assert efforts == [["low", "medium", "high", "xhigh"], ["low", "medium", "high"]]


# ----------------------------------------------------------------------
# 4. Byte streams: chunked coding, server-sent events
# ----------------------------------------------------------------------


def whole(raw: bytes) -> List[bytes]:
    return [raw]


def single_bytes(raw: bytes) -> List[bytes]:
    return [raw[i : i + 1] for i in range(len(raw))]


def cut_in_characters(raw: bytes) -> List[bytes]:
    """Cut behind the first byte of each character of several bytes, or in the middle."""
    ends = [i + 1 for i, byte in enumerate(raw) if byte >= 0xC0] or [len(raw) // 2]
    return [raw[start:end] for start, end in zip([0, *ends], [*ends, len(raw)])]


CUTS = pytest.mark.parametrize("cut", [whole, single_bytes, cut_in_characters])
LINE_ENDS = pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])


@CUTS
@pytest.mark.parametrize(
    ("raw", "body"),
    [
        case("no chunk", b"0\r\n\r\n", b""),
        case("one chunk", b"5\r\nHello\r\n0\r\n\r\n", b"Hello"),
        case("two chunks", b"2\r\nHe\r\n3\r\nllo\r\n0\r\n\r\n", b"Hello"),
        case(
            "a character over two chunks",
            b"2\r\na\xc3\r\n1\r\n\xa9\r\n0\r\n\r\n",
            b"a\xc3\xa9",
        ),
        case(
            "hexadecimal sizes in both cases",
            b"a\r\n0123456789\r\n0B\r\n0123456789a\r\n0\r\n\r\n",
            b"01234567890123456789a",
        ),
        case(
            "line ends and digits inside a chunk",
            b"8\r\n\r\n0\r\n\r\nx\r\n0\r\n\r\n",
            b"\r\n0\r\n\r\nx",
        ),
        case("three chunks", b"3\r\nabc\r\n1\r\nd\r\n2\r\nef\r\n0\r\n\r\n", b"abcdef"),
        case("a size in capitals", b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
        case("a chunk of just a line end", b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
        case("a size of two digits", b"1a\r\n" + b"x" * 26 + b"\r\n0\r\n\r\n", b"x" * 26),
        case("zeros before the size", b"0003\r\nabc\r\n000\r\n\r\n", b"abc"),
        case("an extension", b'3;a="b c";d\r\nabc\r\n0;e\r\n\r\n', b"abc"),
        case("spaces behind the size", b"3 \t\r\nabc\r\n0 \r\n\r\n", b"abc"),
        case("trailers", b"3\r\nabc\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"abc"),
        case("64 trailers", b"3\r\nabc\r\n0\r\n" + b"A: b\r\n" * 64 + b"\r\n", b"abc"),
        case("a trailer of 1 KiB", b"1\r\na\r\n0\r\nA: " + b"b" * 1019 + b"\r\n\r\n", b"a"),
        case("an extension of 1,000 bytes", b"1;" + b"e" * 1000 + b"\r\na\r\n0\r\n\r\n", b"a"),
    ],
)
def test_chunked_body(raw: bytes, body: bytes, cut: Any) -> None:
    decoder = shim.ChunkedDecoder()
    assert b"".join(map(decoder.feed, cut(raw))) == body
    assert (decoder.done, decoder.rest) == (True, b"")


@pytest.mark.parametrize("trailer", [b"", b"A: b\r\n"])
def test_chunked_body_leaves_the_next_request(trailer: bytes) -> None:
    decoder = shim.ChunkedDecoder()
    assert decoder.feed(b"3\r\nabc\r\n0\r\n" + trailer + b"\r\nGET / HTTP/1.1\r\n") == b"abc"
    assert (decoder.done, decoder.rest) == (True, b"GET / HTTP/1.1\r\n")


def test_chunked_body_takes_no_chunk_after_the_last() -> None:
    for burst in (b"3\r\nabc\r\n0\r\n", b"0\r\n"):
        decoder = shim.ChunkedDecoder()
        decoder.feed(burst)
        assert decoder.feed(b"5\r\nhello\r\n") == b""
        with pytest.raises(shim.ProtocolError):
            decoder.feed(b"\r\n")
    decoder = shim.ChunkedDecoder()
    assert decoder.feed(b"0\r\n\r\n5\r\nhello\r\n") == b""
    assert (decoder.done, decoder.rest) == (True, b"5\r\nhello\r\n")


def test_chunked_body_hands_out_an_unfinished_chunk() -> None:
    decoder = shim.ChunkedDecoder()
    fed = [decoder.feed(piece) for piece in (b"5\r\nHe", b"llo", b"\r", b"\n0\r\n", b"\r\n")]
    assert fed == [b"He", b"llo", b"", b"", b""]
    assert decoder.done


@CUTS
@pytest.mark.parametrize(
    "raw",
    [
        case("no size", b"\r\nabc\r\n"),
        case("no hexadecimal size", b"g\r\nabc\r\n"),
        case("a sign", b"-3\r\nabc\r\n"),
        case("a plus", b"+3\r\nabc\r\n"),
        case("a prefix", b"0x3\r\nabc\r\n"),
        case("a digit grouping", b"1_0\r\nabc\r\n"),
        case("a space before the size", b" 3\r\nabc\r\n"),
        case("a line end of LF only", b"3\nabc\r\n"),
        case("a line end of CR only", b"3\rabc\r\n"),
        case("too short a chunk", b"5\r\nabc\r\n0\r\n\r\n"),
        case("too long a chunk", b"3\r\nabcd\r\n0\r\n\r\n"),
        case("a chunk that ends in LF", b"3\r\nabc\n0\r\n\r\n"),
        case("a chunk that ends in something else", b"3\r\nabcXX0\r\n\r\n"),
        case("too large a size", b"123456789\r\nabc\r\n"),
        case("too long an extension", b"3;" + b"a" * 2000 + b"\r\nabc\r\n"),
        case("an extension without end", b"3;" + b"a" * 2000),
        case("an extension with a control character", b"3;a\x00b\r\nabc\r\n"),
        case("two sizes", b"3 3\r\nabc\r\n"),
        case("a line of blanks", b"3" + b" " * 1100 + b"\r\nabc\r\n"),
        case("a line end in a quoted extension", b'3;a="\r\nabc\r\n"\r\n'),
        case("a bare CR in an extension", b"3;a\rb\r\nabc\r\n"),
        case("an extension without a semicolon", b"3 a=b\r\nabc\r\n"),
        case("65 trailers", b"0\r\n" + b"A: b\r\n" * 65 + b"\r\n"),
        case("a trailer of more than 1 KiB", b"0\r\nA: " + b"b" * 1021 + b"\r\n\r\n"),
        *[
            case(f"a trailer {name.decode()}", b"0\r\nA: b\r\n" + name + b": 5\r\n\r\n")
            for name in (b"Content-Length", b"transfer-encoding", b"HOST")
        ],
        case("a folded trailer", b"0\r\nA: b\r\n c\r\n\r\n"),
        case("a bare CR in a trailer", b"0\r\nA: b\rC: d\r\n\r\n"),
        case("a bare LF between trailers", b"0\r\nA: b\nC: d\r\n\r\n"),
        case("a space before the colon of a trailer", b"0\r\nA : b\r\n\r\n"),
        case("trailers without end", b"0\r\n" + b"A: b\r\n" * 4000),
        case("a length in the trailers", b"0\r\ncontent-length: 9\r\n\r\n"),
        case("a host in the trailers", b"0\r\nA: b\r\nHost: evil.example\r\n\r\n"),
        case("a coding in the trailers", b"0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ],
)
def test_chunked_body_that_is_malformed(raw: bytes, cut: Any) -> None:
    decoder = shim.ChunkedDecoder()
    pieces = cut(raw) if len(raw) < 10_000 or cut is whole else [raw[:9000], raw[9000:]]
    with pytest.raises(shim.ProtocolError):
        list(map(decoder.feed, pieces))


@pytest.mark.parametrize("end", range(1, 15))
def test_chunked_body_that_is_cut_is_never_done(end: int) -> None:
    decoder = shim.ChunkedDecoder()
    decoder.feed(b"5\r\nHello\r\n0\r\n\r\n"[:end])
    assert not decoder.done


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        case("nothing is no chunk, for an empty one would end the body", b"", b""),
        case("a piece", b"Hello", b"5\r\nHello\r\n"),
        case("a longer piece", b"x" * 26, b"1a\r\n" + b"x" * 26 + b"\r\n"),
    ],
)
def test_chunk(piece: bytes, expected: bytes) -> None:
    assert shim.chunk(piece) == expected


def event_texts(
    pieces: Iterable[bytes], decoder: Optional[shim.EventDecoder] = None
) -> List[bytes]:
    """The data of all events that the decoder finds; events without data left out."""
    decoder = decoder or shim.EventDecoder()
    blocks = [block for piece in pieces for block in decoder.feed(piece).split(b"\n\n")]
    texts = [shim.event_data(block + b"\n\n") for block in blocks if block.strip(b"\n")]
    return [text for text in texts if text]


@CUTS
@LINE_ENDS
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        case("one event", b"event: a\ndata: {}\n\n", [b"{}"]),
        case("no event name", b"data: {}\n\n", [b"{}"]),
        case("three events", b"data: 1\n\ndata: 2\n\ndata: 3\n\n", [b"1", b"2", b"3"]),
        case("S3-B19: data without a space after the colon", b"data:{}\n\n", [b"{}"]),
        case("S3-B19: data in several lines", b"data: {\ndata:\ndata:}\n\n", [b"{\n\n}"]),
        case("only one space goes", b"data:  a\n\n", [b" a"]),
        case("only one space goes in each line", b"data:  a\ndata:   b\n\n", [b" a\n  b"]),
        case("a tab stays", b"data:\ta\n\n", [b"\ta"]),
        case("the name behind the data", b"data: 1\nevent: a\nid: 7\nretry: 5\n\n", [b"1"]),
        case("comments around it", b": ping\n\n: c\ndata: 1\n: d\n\n:\n\n", [b"1"]),
        case("a comment that looks like data", b": data: 2\n\ndata: 1\n\n", [b"1"]),
        case("a comment line that holds data", b":\ndata: 1\n:data: 2\n\n", [b"1"]),
        case("an event without data", b"event: a\n\ndata: 1\n\n", [b"1"]),
        case("other fields that begin like data", b"database: 2\ndata: 1\ndata-x: 3\n\n", [b"1"]),
        case("a field of another case", b"Data: 2\ndata: 1\n\n", [b"1"]),
        case("a space before the field", b" data: 2\ndata: 1\n\n", [b"1"]),
        case("a colon in the data", b"data: data: 1\n\n", [b"data: 1"]),
        case("more empty lines than needed", b"\n\n\ndata: 1\n\n\n\n\ndata: 2\n\n\n", [b"1", b"2"]),
        case("a byte order mark", b"\xef\xbb\xbfdata: 1\n\n", [b"1"]),
        case(
            "a byte order mark later on is no mark", b"data: 1\n\n\xef\xbb\xbfdata: 2\n\n", [b"1"]
        ),
        case(
            "UTF-8",
            "data: \u00e9\u4e16\U0001f600\n\n".encode(),
            [b"\xc3\xa9\xe4\xb8\x96\xf0\x9f\x98\x80"],
        ),
        case(
            "line separators of Unicode end no line",
            "data: a\u2028b\x85c\n\n".encode(),
            [b"a\xe2\x80\xa8b\xc2\x85c"],
        ),
        case(
            "vertical tabs and form feeds end no line",
            b"data: a\x0bb\x0cc\x1cd\n\n",
            [b"a\x0bb\x0cc\x1cd"],
        ),
        case("S4-B23: an event that is not whole does not come", b"data: 1\n\ndata: 2\n", [b"1"]),
        case("half a line does not come", b"data: 1\n\ndata: 2", [b"1"]),
        case("nothing", b"", []),
    ],
)
def test_events(lines: bytes, expected: List[bytes], line_end: bytes, cut: Any) -> None:
    assert event_texts(cut(lines.replace(b"\n", line_end))) == expected


@LINE_ENDS
def test_events_cut_at_any_three_places(line_end: bytes) -> None:
    raw = b"data: 1\n\ndata: 22\n\ndata: 333\n\n".replace(b"\n", line_end)
    for first, second, third in itertools.combinations(range(1, len(raw)), 3):
        pieces = [raw[:first], raw[first:second], raw[second:third], raw[third:]]
        assert event_texts(pieces) == [b"1", b"22", b"333"], pieces


def test_events_with_line_ends_of_all_kinds() -> None:
    raw = b"data: 1\r\n\ndata: 2\n\r\ndata: 3\r\rdata: 4\n\r"
    for pieces in (whole(raw), single_bytes(raw), [raw[:8], b"", raw[8:]]):
        assert event_texts(pieces) == [b"1", b"2", b"3", b"4"]


def test_line_end_that_is_cut_in_two_is_one_line_end() -> None:
    assert event_texts([b"data: 1\r", b"", b"\ndata: 2\r", b"\n\r\n"]) == [b"1\n2"]


def test_s3_b11_a_line_of_five_megabytes() -> None:
    text = b"x" * (5 << 20)
    raw = b"data: " + text + b"\n\n"
    assert event_texts(raw[i : i + 65536] for i in range(0, len(raw), 65536)) == [text]


@LINE_ENDS
def test_event_over_the_limit_is_an_error(line_end: bytes) -> None:
    decoder = shim.EventDecoder(limit=1000)
    for _ in range(10):
        assert event_texts([b"data: " + b"x" * 900 + line_end * 2], decoder) == [b"x" * 900]
    decoder.feed(b"data: " + b"x" * 500 + line_end)
    with pytest.raises(shim.UpstreamCutError, match="an event of more than 1000 bytes"):
        decoder.feed(b"data: " + b"x" * 500)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        case("without a name", "", b"data: {}\n\n"),
        case("with a name", "ping", b"event: ping\ndata: {}\n\n"),
    ],
)
def test_server_sent_event(name: str, expected: bytes) -> None:
    assert shim.server_sent_event(b"{}", name) == expected


def test_keep_alive_comment_is_no_event() -> None:
    assert shim.COMMENT.startswith(b":")
    assert shim.COMMENT.endswith(b"\n\n")
    assert event_texts([shim.COMMENT, b"data: 1\n\n"]) == [b"1"]


# ----------------------------------------------------------------------
# 5. Messages, the hub
# ----------------------------------------------------------------------

# --- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        case("a good name stays", "get_weather-2", "get_weather-2"),
        case("an id of OpenAI stays", "call_abc", "call_abc"),
        case("128 characters stay", "a" * 128, "a" * 128),
        case("#11: dots and slashes", "mcp.files/read", "mcp_files_read_6efd9b52"),
        case("#11: too long", "a" * 129, "a" * 119 + "_c12cb024"),
        case("letters beyond ASCII", "\u00e9", "__4a99557e"),
        case("half a surrogate pair", "\ud83d", "__8a8de823"),
        case("a line end behind it", "a\n", "a__87428fc5"),
        case("nothing", "", "_e3b0c442"),
    ],
)
def test_safe_name(name: str, expected: str) -> None:
    assert shim.safe_name(name) == expected


def test_safe_names_of_distinct_names_are_distinct() -> None:
    names = ["a.b", "a/b", "a b", "a_b", "a:b", "a..b", "", " ", "x" * 129, "x" * 130, "\u00e9"]
    assert len({shim.safe_name(name) for name in names}) == 11


# --- content blocks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        case("text", "a", [{"type": "text", "text": "a"}]),
        case("white space around text stays", " a\n", [{"type": "text", "text": " a\n"}]),
        case("#4: empty text is no block", "", []),
        case("#4: white space is no block", " \t\r\n\u00a0", []),
    ],
)
def test_text_block(text: str, expected: List[JSON]) -> None:
    assert shim.text_block(text) == expected


PNG_BYTES = b"\x89PNG\r\n\x1a\n" + b"\x00" * 30
JPEG_BYTES = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"
GIF_BYTES = b"GIF89a\x01\x00\x01\x00"
WEBP_BYTES = b"RIFF\x1a\x00\x00\x00WEBPVP8L"
WAV_BYTES = b"RIFF\x24\x80\x00\x00WAVEfmt "
PDF_BYTES = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"


def base64_of(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def base64_source(media_type: str, raw: bytes) -> JSON:
    return {"type": "base64", "media_type": media_type, "data": base64_of(raw)}


def image_of(media_type: str, raw: bytes) -> JSON:
    return {"type": "image", "source": base64_source(media_type, raw)}


IMAGE_ROWS = [
    case(
        "S4-B17: an https URL is handed on, never fetched",
        "https://e.org/a.png",
        {"type": "image", "source": {"type": "url", "url": "https://e.org/a.png"}},
    ),
    case(
        "an http URL is handed on",
        "http://e.org/a?b",
        {"type": "image", "source": {"type": "url", "url": "http://e.org/a?b"}},
    ),
    case("PNG", "data:image/png;base64," + base64_of(PNG_BYTES), image_of("image/png", PNG_BYTES)),
    case(
        "JPEG",
        "data:image/jpeg;base64," + base64_of(JPEG_BYTES),
        image_of("image/jpeg", JPEG_BYTES),
    ),
    case("GIF", "data:image/gif;base64," + base64_of(GIF_BYTES), image_of("image/gif", GIF_BYTES)),
    case(
        "WebP",
        "data:image/webp;base64," + base64_of(WEBP_BYTES),
        image_of("image/webp", WEBP_BYTES),
    ),
    case(
        "S4-B17: the bytes tell the type, not the label",
        "data:image/png;base64," + base64_of(JPEG_BYTES),
        image_of("image/jpeg", JPEG_BYTES),
    ),
    case(
        "S4-B22: a data URL with parameters",
        "data:image/png;charset=utf-8;name=a.png;base64," + base64_of(PNG_BYTES),
        image_of("image/png", PNG_BYTES),
    ),
    case(
        "no type, but bytes that tell it",
        "data:;base64," + base64_of(GIF_BYTES),
        image_of("image/gif", GIF_BYTES),
    ),
    case(
        "a type of other case",
        "data:IMAGE/PNG;BASE64," + base64_of(PNG_BYTES),
        image_of("image/png", PNG_BYTES),
    ),
    case(
        "image/jpg is image/jpeg, whatever the bytes",
        "data:image/jpg;base64," + base64_of(b"\x00\x01\x02"),
        image_of("image/jpeg", b"\x00\x01\x02"),
    ),
    case(
        "percent-encoded bytes",
        "data:image/gif,GIF89a%01%00%01%00",
        image_of("image/gif", GIF_BYTES),
    ),
]


@pytest.mark.parametrize(("url", "expected"), IMAGE_ROWS)
def test_image_block(url: str, expected: JSON) -> None:
    assert shim.image_block(url, "messages.0.content.1") == expected


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        case("S4-B22: SVG", "data:image/svg+xml;base64,PHN2Zz4=", "not image/svg+xml"),
        case("BMP", "data:image/bmp;base64," + base64_of(b"BM1234567"), "not image/bmp"),
        case("a PDF", "data:application/pdf;base64," + base64_of(PDF_BYTES), "not application/pdf"),
        case(
            "sound that begins like WebP",
            "data:audio/wav;base64," + base64_of(WAV_BYTES),
            "audio/wav",
        ),
        case("no type at all", "data:;base64,AAAA", "not unknown type"),
        case("no comma", "data:image/png;base64", "the comma is missing"),
        case("a path of a file", "/etc/passwd", "expected an http(s) or data: URL"),
        case("a file URL", "file:///etc/passwd", "expected an http(s) or data: URL"),
        case("nothing", "", "expected an http(s) or data: URL"),
    ],
)
def test_image_that_claude_does_not_read(url: str, sentence: str) -> None:
    with pytest.raises(shim.RequestError) as caught:
        shim.image_block(url, "messages.0.content.1")
    assert caught.value.param == "messages.0.content.1"
    assert sentence in caught.value.message
    assert len(caught.value.message) < 200


def document_of(source: JSON, **more: Any) -> JSON:
    return {"type": "document", "source": source, **more}


PLAIN: JSON = {"type": "text", "media_type": "text/plain", "data": "Z\u00fcrich, 21\u00b0"}
PLAIN_BYTES = b"Z\xc3\xbcrich, 21\xc2\xb0"


@pytest.mark.parametrize(
    ("content", "title", "expected"),
    [
        case(
            "S4-B13: a PDF",
            "data:application/pdf;base64," + base64_of(PDF_BYTES),
            "a.pdf",
            document_of(base64_source("application/pdf", PDF_BYTES), title="a.pdf"),
        ),
        case(
            "a PDF under a wrong label",
            "data:application/octet-stream;base64," + base64_of(PDF_BYTES),
            None,
            document_of(base64_source("application/pdf", PDF_BYTES)),
        ),
        case(
            "a PDF as bare base64",
            base64_of(PDF_BYTES),
            "",
            document_of(base64_source("application/pdf", PDF_BYTES)),
        ),
        case(
            "a URL is handed on, never fetched",
            "https://e.org/a.pdf",
            "a.pdf",
            document_of({"type": "url", "url": "https://e.org/a.pdf"}, title="a.pdf"),
        ),
        case(
            "text",
            "data:text/plain;base64," + base64_of(PLAIN_BYTES),
            "a.txt",
            document_of(PLAIN, title="a.txt"),
        ),
        case("text as bare base64", base64_of(PLAIN_BYTES), 5, document_of(PLAIN)),
        case(
            "text of another kind",
            "data:text/csv;charset=utf-8;base64," + base64_of(PLAIN_BYTES),
            None,
            document_of(PLAIN),
        ),
        case("percent-encoded text", "data:,Z%C3%BCrich, 21%C2%B0", None, document_of(PLAIN)),
        case(
            "an image stays an image",
            "data:image/png;base64," + base64_of(PNG_BYTES),
            "a.png",
            image_of("image/png", PNG_BYTES),
        ),
        case(
            "an image as bare base64",
            base64_of(JPEG_BYTES),
            None,
            image_of("image/jpeg", JPEG_BYTES),
        ),
    ],
)
def test_document_block(content: str, title: Any, expected: JSON) -> None:
    assert shim.document_block(content, title, "p") == expected


@pytest.mark.parametrize(
    "content",
    [
        case("an archive", base64_of(b"PK\x03\x04\x14\x00\x86\xff")),
        case("sound that begins like WebP", "data:audio/wav;base64," + base64_of(WAV_BYTES)),
        case("no base64", "hello, world"),
        case("text beyond ASCII", "\u00e9\u00e9\u00e9\u00e9"),
        case("an image of another kind", "data:image/tiff;base64," + base64_of(b"II*\x00")),
        case("no comma", "data:text/plain"),
    ],
)
def test_document_that_claude_does_not_read(content: str) -> None:
    with pytest.raises(shim.RequestError) as caught:
        shim.document_block(content, "a.bin", "messages.0.content.0.file")
    assert caught.value.param == "messages.0.content.0.file"


# --- tools and schemas


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        case("an object as text", '{"a": [1, "\\u00e9"]}', {"a": [1, "\u00e9"]}),
        case("an object as it is", {"a": 1}, {"a": 1}),
        case("no text", "", {}),
        case("white space", " \n", {}),
        case("null", None, {}),
        case("null as text", "null", {}),
        case("S4-B22: half an object", '{"a": ', {"_raw": '{"a": '}),
        case("S4-B22: plain text", "Paris", {"_raw": "Paris"}),
        case("a list as text", "[1]", {"_raw": [1]}),
        case("a list as it is", [1], {"_raw": [1]}),
        case("a number", 0, {"_raw": 0}),
        case("a boolean", False, {"_raw": False}),
        case("NaN", '{"a": NaN}', {"_raw": '{"a": NaN}'}),
        case("too deep an object", "[" * 100_000, {"_raw": "[" * 100_000}),
        case("half a surrogate pair", '{"a":"\\ud83d"}', {"a": "\ufffd"}),
    ],
)
def test_tool_input(arguments: Any, expected: JSON) -> None:
    assert shim.tool_input(arguments) == expected


NO_FIELDS: JSON = {"type": "object", "properties": {}}

TOOL_SCHEMA_ROWS = [
    case("no parameters", None, NO_FIELDS),
    case("an empty object", {}, NO_FIELDS),
    case("#39: a type that is null", {"type": None}, NO_FIELDS),
    case("properties that are null", {"type": "object", "properties": None}, NO_FIELDS),
    case(
        "a good schema stays",
        {"type": "object", "properties": {"a": {"minimum": 1}}, "required": ["a"], "x": 1},
        {"type": "object", "properties": {"a": {"minimum": 1}}, "required": ["a"], "x": 1},
    ),
    case(
        "a schema as text",
        '{"properties": {"a": {}}}',
        {"type": "object", "properties": {"a": {}}},
    ),
    case(
        "#13: $schema goes",
        {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": {}}},
    ),
    case(
        "a property of the name $schema stays",
        {"properties": {"$schema": {"type": "string"}}},
        {"type": "object", "properties": {"$schema": {"type": "string"}}},
    ),
    case(
        "#13: definitions become $defs, and references follow",
        {
            "properties": {"a": {"$ref": "#/definitions/A"}, "b": {"$ref": "#/$defs/B"}},
            "definitions": {"A": {"items": {"$ref": "#/definitions/A"}}},
            "$defs": {"B": {}},
        },
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"$ref": "#/$defs/B"}},
            "$defs": {"A": {"items": {"$ref": "#/$defs/A"}}, "B": {}},
        },
    ),
    case(
        "a property of the name definitions stays",
        {"properties": {"definitions": {"type": "array"}, "b": {}}, "required": ["definitions"]},
        {
            "type": "object",
            "properties": {"definitions": {"type": "array"}, "b": {}},
            "required": ["definitions"],
        },
    ),
    case(
        "values are no schemas",
        {
            "properties": {
                "a": {"default": {"definitions": {"$schema": "x"}}, "enum": [{"$ref": 5}]}
            }
        },
        {
            "type": "object",
            "properties": {
                "a": {"default": {"definitions": {"$schema": "x"}}, "enum": [{"$ref": 5}]}
            },
        },
    ),
    case(
        "draft 4: boolean limits",
        {
            "properties": {
                "a": {"minimum": 1, "exclusiveMinimum": True},
                "b": {"maximum": 9, "exclusiveMaximum": False},
                "c": {"exclusiveMinimum": True},
            }
        },
        {
            "type": "object",
            "properties": {"a": {"exclusiveMinimum": 1}, "b": {"maximum": 9}, "c": {}},
        },
    ),
    case(
        "draft 2020-12: limits that are numbers stay",
        {"properties": {"a": {"minimum": 1, "exclusiveMinimum": 2}}},
        {"type": "object", "properties": {"a": {"minimum": 1, "exclusiveMinimum": 2}}},
    ),
    case(
        "draft 7: a list of items is prefixItems today",
        {"properties": {"a": {"items": [{"type": "string"}, {"type": "number"}]}}},
        {
            "type": "object",
            "properties": {"a": {"prefixItems": [{"type": "string"}, {"type": "number"}]}},
        },
    ),
    case(
        "#12: anyOf at the root: what any branch takes, what all require",
        {
            "anyOf": [
                {"properties": {"a": {"type": "string"}, "c": {}}, "required": ["a", "c"]},
                {"properties": {"b": {"type": "number"}, "c": {}}, "required": ["c", "b"]},
            ],
        },
        {
            "type": "object",
            "properties": {"a": {"type": "string"}, "c": {}, "b": {"type": "number"}},
            "required": ["c"],
        },
    ),
    case(
        "#12: oneOf at the root beside fields of its own",
        {
            "type": "object",
            "properties": {"id": {"type": "string"}},
            "required": ["id"],
            "oneOf": [{"required": ["id"]}, {"properties": {"b": {}}}, True],
        },
        {
            "type": "object",
            "properties": {"b": {}, "id": {"type": "string"}},
            "required": ["id"],
        },
    ),
    case(
        "#12: allOf at the root: all that any requires",
        {
            "allOf": [
                {"properties": {"a": {}}, "required": ["a"]},
                {"properties": {"b": {}}, "required": ["b"]},
            ],
        },
        {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
    ),
    case(
        "#12: branches that tell themselves apart by one field",
        {
            "oneOf": [
                {"properties": {"kind": {"const": "a"}, "x": {}}, "required": ["kind", "x"]},
                {"properties": {"kind": {"const": "b"}, "y": {}}, "required": ["kind", "y"]},
            ],
        },
        {
            "type": "object",
            "properties": {"kind": {"anyOf": [{"const": "a"}, {"const": "b"}]}, "x": {}, "y": {}},
            "required": ["kind"],
        },
    ),
    case(
        "#12: allOf at the root where two say something of one field",
        {
            "allOf": [
                {"properties": {"a": {"type": "integer"}}},
                {"properties": {"a": {"minimum": 1}}},
            ],
        },
        {
            "type": "object",
            "properties": {"a": {"allOf": [{"type": "integer"}, {"minimum": 1}]}},
        },
    ),
    case(
        "#12: branches that are references",
        {
            "anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/definitions/B"}],
            "$defs": {"A": {"properties": {"a": {}}, "required": ["a"]}},
            "definitions": {"B": {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]}},
        },
        {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "required": ["a"],
            "$defs": {
                "A": {"properties": {"a": {}}, "required": ["a"]},
                "B": {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
            },
        },
    ),
    case(
        "#12: branches with properties of a wrong type", {"anyOf": [{"properties": 5}]}, NO_FIELDS
    ),
    case("#12: branches that require a wrong type", {"oneOf": [{"required": 5}, 7]}, NO_FIELDS),
    case("#12: branches that require objects", {"allOf": [{"required": [{}]}]}, NO_FIELDS),
    case("#12: properties of a wrong type", {"anyOf": [], "properties": "ab"}, NO_FIELDS),
    case(
        "unions further in stay",
        {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}},
        {
            "type": "object",
            "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
        },
    ),
]


@pytest.mark.parametrize(("parameters", "expected"), TOOL_SCHEMA_ROWS)
def test_tool_schema(parameters: Any, expected: JSON) -> None:
    before = copy.deepcopy(parameters)
    assert shim.tool_schema(parameters, "tools.0.parameters") == expected
    assert parameters == before


@pytest.mark.parametrize(
    "parameters",
    [
        case("a list", []),
        case("a number", 5),
        case("a union of a wrong type", {"anyOf": {"a": 1}}),
    ],
)
def test_tool_schema_of_a_wrong_type_names_its_path(parameters: Any) -> None:
    with pytest.raises(shim.RequestError) as caught:
        shim.tool_schema(parameters, "tools.0.parameters")
    assert str(caught.value.param).startswith("tools.0.parameters")


CLOSED: JSON = {"type": "object", "additionalProperties": False}

OUTPUT_SCHEMA_ROWS = [
    case("an empty schema", {}, {}, []),
    case(
        "objects are closed, however deep",
        {"type": "object", "properties": {"a": {"items": {"type": "object"}}}},
        {**CLOSED, "properties": {"a": {"items": {**CLOSED, "properties": {}}}}},
        [],
    ),
    case(
        "properties make an object",
        {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {**CLOSED, "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        [],
    ),
    case(
        "OpenAI's strict schema stays",
        {
            "type": "object",
            "properties": {
                "a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "b": {"$ref": "#/$defs/B"},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"B": {"enum": ["x", 1]}},
        },
        {
            "type": "object",
            "properties": {
                "a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "b": {"$ref": "#/$defs/B"},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"B": {"enum": ["x", 1]}},
        },
        [],
    ),
    case(
        "#10: what constrained output does not take becomes a hint",
        {"type": "integer", "minimum": 1, "multipleOf": 2, "description": "A number."},
        {"type": "integer", "description": "A number. (minimum: 1, multipleOf: 2)"},
        ["minimum", "multipleOf"],
    ),
    case(
        "#10: a keyword is named once",
        {
            "type": "object",
            "properties": {
                "a": {"type": "string", "maxLength": 3},
                "b": {"type": "string", "maxLength": 4},
            },
        },
        {
            **CLOSED,
            "properties": {
                "a": {"type": "string", "description": "(maxLength: 3)"},
                "b": {"type": "string", "description": "(maxLength: 4)"},
            },
        },
        ["maxLength"],
    ),
    case(
        "#10: minItems may be 0 or 1",
        {"anyOf": [{"minItems": 0}, {"minItems": 1}, {"minItems": 2}]},
        {"anyOf": [{"minItems": 0}, {"minItems": 1}, {"description": "(minItems: 2)"}]},
        ["minItems"],
    ),
    case(
        "formats that are known stay",
        {"anyOf": [{"format": "date-time"}, {"format": "uuid"}, {"format": "phone"}]},
        {
            "anyOf": [
                {"format": "date-time"},
                {"format": "uuid"},
                {"description": '(format: "phone")'},
            ]
        },
        ["format"],
    ),
    case(
        "#10: oneOf becomes anyOf",
        {"oneOf": [{"type": "string"}, {"type": "object"}]},
        {"anyOf": [{"type": "string"}, {**CLOSED, "properties": {}}]},
        [],
    ),
    case(
        "objects that were open are reported",
        {"type": "object", "additionalProperties": {"type": "string"}},
        {**CLOSED, "properties": {}},
        ["additionalProperties"],
    ),
    case(
        "objects that were open on purpose are reported",
        {"type": "object", "additionalProperties": True},
        {**CLOSED, "properties": {}},
        ["additionalProperties"],
    ),
    case(
        "an object that may be null stays so",
        {"type": ["object", "null"], "properties": {"a": {}}},
        {"type": ["object", "null"], "properties": {"a": {}}, "additionalProperties": False},
        [],
    ),
    case(
        "properties may have the names of keywords",
        {"type": "object", "properties": {"minimum": {"type": "integer"}, "not": {}}},
        {**CLOSED, "properties": {"minimum": {"type": "integer"}, "not": {}}},
        [],
    ),
    case(
        "a property of the name definitions stays",
        {"type": "object", "properties": {"definitions": {"type": "string"}}},
        {**CLOSED, "properties": {"definitions": {"type": "string"}}},
        [],
    ),
    case(
        "definitions become $defs and are closed too",
        {"$ref": "#/definitions/A", "definitions": {"A": {"type": "object"}}},
        {"$ref": "#/$defs/A", "$defs": {"A": {**CLOSED, "properties": {}}}},
        [],
    ),
    case(
        "values are no schemas",
        {"const": {"minimum": 1}, "default": {"type": "object"}, "enum": [{"pattern": "x"}]},
        {"const": {"minimum": 1}, "default": {"type": "object"}, "enum": [{"pattern": "x"}]},
        [],
    ),
]


@pytest.mark.parametrize(("schema", "expected", "gone"), OUTPUT_SCHEMA_ROWS)
def test_output_schema(schema: JSON, expected: JSON, gone: List[str]) -> None:
    before = copy.deepcopy(schema)
    assert shim.output_schema(schema, "response_format.json_schema.schema") == (expected, gone)
    assert schema == before


def test_output_schema_reports_a_reference_to_another_document() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://e.org/schema.json"}}}
    cleaned, gone = shim.output_schema(schema, "p")
    assert "$ref" not in cleaned["properties"]["a"]
    assert gone == ["$ref"]


def test_output_schema_loses_no_union_in_silence() -> None:
    schema = {"anyOf": [{"const": 1}, {"const": 2}], "oneOf": [{"const": 1}, {"const": 3}]}
    cleaned, gone = shim.output_schema(schema, "p")
    kept = json.dumps(cleaned)
    assert gone or ('{"const": 2}' in kept and '{"const": 3}' in kept)


@pytest.mark.parametrize("schema", [None, [], "{}", 5])
def test_output_schema_of_a_wrong_type(schema: Any) -> None:
    with pytest.raises(shim.RequestError) as caught:
        shim.output_schema(schema, "response_format.schema")
    assert caught.value.param == "response_format.schema"


SCHEMA_WORDS = (
    "$defs $ref $schema additionalProperties allOf anyOf const default definitions description "
    "enum "
    "exclusiveMinimum format items maximum minItems minimum oneOf properties required title type"
).split()


def random_value(chance: random.Random, depth: int, words: Sequence[str]) -> Any:
    """A JSON value of any type, its members named after `words`."""
    kind = chance.randrange(9 if depth else 6)
    if kind < 6:
        return (None, True, 5, "object", chance.choice(words), 1.5)[kind]
    if kind == 6:
        return [random_value(chance, depth - 1, words) for _ in range(chance.randrange(3))]
    names = chance.sample(list(words), chance.randrange(5))
    return {name: random_value(chance, depth - 1, words) for name in names}


def random_object(chance: random.Random, words: Sequence[str]) -> JSON:
    return {name: random_value(chance, 3, words) for name in chance.sample(list(words), 4)}


def crash_of(call: Any, *arguments: Any) -> str:
    """What a call raises that is no bad request with a path, or an empty string."""
    try:
        call(*arguments)
    except shim.RequestError as error:
        return "" if error.param and error.param.startswith("tools.0") else f"param {error.param}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:90]
    return ""


def test_schemas_of_wrong_types_at_any_depth_are_bad_requests_at_worst() -> None:
    chance = random.Random(1)
    crashes = set()
    for _ in range(3000):
        schema = random_object(chance, SCHEMA_WORDS)
        before = copy.deepcopy(schema)
        crashes.add(crash_of(shim.tool_schema, schema, "tools.0"))
        crashes.add(crash_of(shim.output_schema, schema, "tools.0"))
        assert schema == before
    assert crashes == {""}


# --- a request in the making


def text_of(text: str, **more: Any) -> JSON:
    return {"type": "text", "text": text, **more}


def tool_of(name: str, **more: Any) -> JSON:
    return {"name": name, "input_schema": {"type": "object", "properties": {}}, **more}


def test_draft_recalls_nothing_unless_told_how() -> None:
    assert shim.Draft("claude-opus-5-5").recall("toolu_01") == []
    assert shim.Draft("claude-opus-5-5", lambda call: [text_of(call)]).recall("a") == [text_of("a")]


def test_draft_names_what_it_ignores_once() -> None:
    draft = shim.Draft("claude-opus-5-5")
    for field in ("logprobs", "seed", "logprobs"):
        draft.ignore(field)
    assert list(draft.ignored) == ["logprobs", "seed"]


def test_draft_remembers_the_names_that_it_changed() -> None:
    draft = shim.Draft("claude-opus-5-5")
    assert [draft.tool_name(name) for name in ("good", "a.b")] == ["good", "a_b_2e7336dc"]
    assert draft.original_names == {"a_b_2e7336dc": "a.b"}


def test_draft_keeps_the_last_of_two_tools_of_one_name() -> None:
    draft = shim.Draft("claude-opus-5-5")
    for tool in (tool_of("a", description="1"), tool_of("b"), tool_of("a", description="2")):
        draft.add_tool(tool)
    assert list(draft.request["tools"]) == [tool_of("b"), tool_of("a", description="2")]


def test_draft_keeps_all_tools_that_have_no_name() -> None:
    draft = shim.Draft("claude-opus-5-5")
    tools: List[JSON] = [
        {"type": "computer_toolset_20260801"},
        {"type": "browser_toolset_20260801"},
        {"type": "mcp_toolset", "mcp_server_name": "one"},
        {"type": "mcp_toolset", "mcp_server_name": "two"},
    ]
    for tool in tools:
        draft.add_tool(tool)
    assert list(draft.request["tools"]) == tools


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        case("auto", {"type": "auto"}, {"type": "auto", "disable_parallel_tool_use": True}),
        case("any", {"type": "any"}, {"type": "any", "disable_parallel_tool_use": True}),
        case(
            "a tool",
            {"type": "tool", "name": "a"},
            {"type": "tool", "name": "a", "disable_parallel_tool_use": True},
        ),
        case("none has no such mark", {"type": "none"}, {"type": "none"}),
    ],
)
def test_draft_tool_choice_keeps_the_mark_against_parallel_calls(
    choice: JSON, expected: JSON
) -> None:
    draft = shim.Draft("claude-opus-5-5")
    draft.require_tools({"type": "auto", "disable_parallel_tool_use": True})
    draft.require_tools(choice)
    assert draft.request["tool_choice"] == expected


def test_draft_finished() -> None:
    draft = shim.Draft("claude-opus-5-5")
    draft.system.append(text_of("Be brief."))
    draft.turns.append(("user", [text_of("Hi")]))
    draft.require_tools({"type": "auto"})
    assert draft.finished() == {
        "model": "claude-opus-5-5",
        "system": [text_of("Be brief.")],
        "messages": [{"role": "user", "content": [text_of("Hi")]}],
        "stream": True,
    }  # no system when it is empty, no tool_choice without tools: both are a 400
    draft.system.clear()
    draft.add_tool(tool_of("a"))
    assert draft.finished() == {
        "model": "claude-opus-5-5",
        "messages": [{"role": "user", "content": [text_of("Hi")]}],
        "tools": [tool_of("a")],
        "tool_choice": {"type": "auto"},
        "stream": True,
    }


def test_s2_f6_draft_without_messages_is_a_bad_request() -> None:
    with pytest.raises(shim.RequestError) as caught:
        shim.Draft("claude-opus-5-5").finished()
    assert caught.value.param == "messages"


# --- images around the encoder

IMAGE_DATA = ["iVBORw0KGgoAAAA+/w==", "A" * 8, "A" * 9, "AAAAAAAAAAAA\nAAAA", "AAAAAAAAAAA\u00e9",
              "\x7f", 'AAAAAAAAAAAAAA"', "AAAAAAAAAAAAAA\\", "AAAAAAAAAAAAAA\x00",
              "\ud83dAAAAAAAAAAA", "", "AAAAAA\x7fAAAAAAAA", None, 1]  # fmt: skip
BLOCK_TEXT = [
    "hi",
    "\x7f",
    '"\x7f',
    '\x7f"',
    "iVBORw0KGgoAAAA+/w==",
    "\u00e9",
    '{"data":"AAAAAAAAAAAA"}',
]


def random_block(chance: random.Random, depth: int) -> JSON:
    """A text, an image, or a result or another block around some of them."""
    kind = chance.randrange(4 if depth else 3)
    if kind == 0:
        return text_of(chance.choice(BLOCK_TEXT))
    if kind < 3:
        source = {"type": "base64", "data": chance.choice(IMAGE_DATA), "media_type": "image/png"}
        return {"type": "image", "source": chance.choice([source, source, source, "text"])}
    content = [random_block(chance, depth - 1) for _ in range(chance.randrange(4))]
    return {"type": "tool_result", "content": chance.choice([content, content, "text", ["text"]])}


def test_images_around_the_encoder_are_the_same_as_encoded_ones() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        blocks = [random_block(chance, 2) for _ in range(chance.randrange(5))]
        request = {"model": "m", "messages": [{"role": "user", "content": blocks}], "stream": True}
        before = copy.deepcopy(request)
        assert shim.request_text(request, 8) == shim.dumps(request)
        assert request == before


def test_large_image_goes_up_as_it_came() -> None:
    data = "iVBORw0KGgo" + "A" * 300_000
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    draft = shim.messages_request_from_chat(shim.loads(json.dumps(body).encode()), "claude-x")
    source = {"type": "base64", "media_type": "image/png", "data": data}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    expected = {"model": "claude-x", "messages": messages, "stream": True}
    assert shim.request_text(draft.finished()) == shim.dumps(expected)


# --- the order of a conversation

Turn = Tuple[str, List[JSON]]


def asked(*blocks: Union[str, JSON]) -> Turn:
    return "user", [text_of(block) if isinstance(block, str) else block for block in blocks]


def told(*blocks: Union[str, JSON]) -> Turn:
    return "assistant", asked(*blocks)[1]


def ruled(*texts: str) -> Turn:
    return "system", asked(*texts)[1]


def tool_use(id: str, **more: Any) -> JSON:
    return {"type": "tool_use", "id": id, "name": "f", "input": {}, **more}


def tool_result(id: str, content: Any = "18C", **more: Any) -> JSON:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def unanswered(id: str) -> JSON:
    return {"type": "tool_result", "content": "(no result)", "is_error": True, "tool_use_id": id}


def reminder(text: str) -> JSON:
    return text_of(f"<system-reminder>\n{text}\n</system-reminder>")


START = asked("(The conversation starts here.)")
PICTURE = image_of("image/png", PNG_BYTES)

CONVERSATION_ROWS = [
    case("a question", [asked("Hi")], [asked("Hi")]),
    case(
        "S4-B15: turns stay turns",
        [asked("1"), told("2"), asked("3")],
        [asked("1"), told("2"), asked("3")],
    ),
    case(
        "turns of one role become one",
        [asked("1"), asked("2", "3"), told("4"), told("5")],
        [asked("1", "2", "3"), told("4", "5")],
    ),
    case(
        "turns without content go",
        [asked(), asked("1"), told(), asked("2")],
        [asked("1", "2")],
    ),
    case(
        "a conversation that starts with an answer",
        [told("Hi"), asked("1")],
        [START, told("Hi"), asked("1")],
    ),
    case(
        "#3, S4-B22: results of parallel calls share one turn, in the order of the calls",
        [
            asked("1"),
            told(tool_use("a"), tool_use("b")),
            asked(tool_result("b")),
            asked(tool_result("a")),
        ],
        [asked("1"), told(tool_use("a"), tool_use("b")), asked(tool_result("a"), tool_result("b"))],
    ),
    case(
        "results come before text and images that came between them",
        [
            asked("1"),
            told(tool_use("a"), tool_use("b")),
            asked(tool_result("a")),
            asked(PICTURE, "2"),
            asked(tool_result("b")),
            asked("3"),
        ],
        [
            asked("1"),
            told(tool_use("a"), tool_use("b")),
            asked(tool_result("a"), tool_result("b"), PICTURE, "2", "3"),
        ],
    ),
    case(
        "S4-B12: results keep images, errors and all of their text",
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a", [PICTURE, text_of("x" * 9000)], is_error=True)),
        ],
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a", [PICTURE, text_of("x" * 9000)], is_error=True)),
        ],
    ),
    case(
        "calls in several turns are answered each",
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a")),
            told(tool_use("b")),
            asked(tool_result("b")),
        ],
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a")),
            told(tool_use("b")),
            asked(tool_result("b")),
        ],
    ),
    case(
        "a call without a result gets one that says so",
        [asked("1"), told(tool_use("a"), tool_use("b")), asked("2", tool_result("b"))],
        [
            asked("1"),
            told(tool_use("a"), tool_use("b")),
            asked(unanswered("a"), tool_result("b"), "2"),
        ],
    ),
    case(
        "a call at the very end gets a result",
        [asked("1"), told(tool_use("a"))],
        [asked("1"), told(tool_use("a")), asked(unanswered("a"))],
    ),
    case(
        "#35: of two results for one call the last counts",
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a", "1C"), tool_result("a", "2C")),
        ],
        [asked("1"), told(tool_use("a")), asked(tool_result("a", "2C"))],
    ),
    case(
        "#22: a call that comes twice in a turn is one call",
        [asked("1"), told(tool_use("a"), "2", tool_use("a")), asked(tool_result("a"))],
        [asked("1"), told(tool_use("a"), "2"), asked(tool_result("a"))],
    ),
    case(
        "ids that come again in a later turn are numbered, with their results",
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a", "1C")),
            told(tool_use("a"), tool_use("b")),
            asked(tool_result("b", "2C"), tool_result("a", "3C")),
        ],
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a", "1C")),
            told(tool_use("a_1"), tool_use("b")),
            asked(tool_result("a_1", "3C"), tool_result("b", "2C")),
        ],
    ),
    case(
        "a result without its call becomes text",
        [asked(tool_result("x", "1C"), "2"), told("3"), asked(tool_result("y", [PICTURE]), "4")],
        [asked("1C", "2"), told("3"), asked(PICTURE, "4")],
    ),
    case(
        "a result of an earlier call is stray later on",
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a")),
            told("2"),
            asked(tool_result("a", "late")),
        ],
        [
            asked("1"),
            told(tool_use("a")),
            asked(tool_result("a")),
            told("2"),
            asked("late"),
        ],
    ),
    case(
        "#16: a system message before an answer stays in its place",
        [asked("1"), ruled("R"), told("2"), asked("3")],
        [asked("1"), ruled("R"), told("2"), asked("3")],
    ),
    case(
        "#16: a system message at the end stays", [asked("1"), ruled("R")], [asked("1"), ruled("R")]
    ),
    case(
        "#16: system messages in a row are one",
        [asked("1"), ruled("R"), ruled("S")],
        [asked("1"), ruled("R", "S")],
    ),
    case(
        "#16: a system message between questions becomes text in its place",
        [asked("1"), ruled("R"), asked("2"), told("3")],
        [asked("1", reminder("R"), "2"), told("3")],
    ),
    case(
        "#16: a system message behind an answer becomes text",
        [asked("1"), told("2"), ruled("R"), asked("3")],
        [asked("1"), told("2"), asked(reminder("R"), "3")],
    ),
    case(
        "#16: a system message at the start becomes text",
        [ruled("R"), asked("1")],
        [asked(reminder("R"), "1")],
    ),
    case(
        "a system message between a call and its result stands behind the result",
        [asked("1"), told(tool_use("a")), ruled("R"), asked(tool_result("a"))],
        [asked("1"), told(tool_use("a")), asked(tool_result("a"), reminder("R"))],
    ),
    case(
        "a system message between two results stands behind them",
        [
            asked("1"),
            told(tool_use("a"), tool_use("b")),
            asked(tool_result("a")),
            ruled("R"),
            asked(tool_result("b")),
        ],
        [
            asked("1"),
            told(tool_use("a"), tool_use("b")),
            asked(tool_result("a"), tool_result("b"), reminder("R")),
        ],
    ),
    case(
        "a cache mark on a system message survives",
        [ruled(), ("system", [text_of("R", cache_control={"type": "ephemeral"})]), asked("1")],
        [asked({**reminder("R"), "cache_control": {"type": "ephemeral"}}, "1")],
    ),
    case(
        "S4-B14: thinking stays before its call",
        [
            asked("1"),
            told({"type": "thinking", "thinking": "", "signature": "s"}, tool_use("a")),
            asked(tool_result("a")),
        ],
        [
            asked("1"),
            told({"type": "thinking", "thinking": "", "signature": "s"}, tool_use("a")),
            asked(tool_result("a")),
        ],
    ),
]


@pytest.mark.parametrize(("turns", "expected"), CONVERSATION_ROWS)
def test_conversation(turns: List[Turn], expected: List[Turn]) -> None:
    before = copy.deepcopy(turns)
    messages = shim.conversation(turns)
    assert messages == [{"role": role, "content": blocks} for role, blocks in expected]
    assert turns == before
    again = shim.conversation([(message["role"], message["content"]) for message in messages])
    assert again == messages


@pytest.mark.parametrize("turns", [[], [asked()], [asked(), told(), ruled()]])
def test_conversation_without_content_is_a_bad_request(turns: List[Turn]) -> None:
    with pytest.raises(shim.RequestError) as caught:
        shim.conversation(turns)
    assert caught.value.param == "messages"


def test_thinking_before_a_call_that_is_dropped_does_not_end_the_turn() -> None:
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    thought = {"type": "thinking", "thinking": "t", "signature": "s"}
    (_, turn, _) = shim.conversation([("assistant", [thought, call, thought, call])])
    assert turn == {"role": "assistant", "content": [thought, call]}


@pytest.mark.parametrize("content", ["", " ", [], None])
def test_conversation_has_no_turn_without_content_for_a_stray_empty_result(content: Any) -> None:
    messages = shim.conversation([asked(tool_result("x", content)), told("1"), asked("2")])
    assert messages[-2:] == [
        {"role": "assistant", "content": [text_of("1")]},
        {"role": "user", "content": [text_of("2")]},
    ]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert all(message["content"] for message in messages)


def misordered(messages: List[JSON]) -> List[str]:
    """What Anthropic refuses in the order of `messages` (its sentences, shortened)."""
    faults = []
    roles = [message["role"] for message in messages]
    if roles[0] != "user":
        faults.append("the first message is not the user's")
    calls: List[str] = []
    ids = [b["id"] for m in messages for b in m["content"] if b["type"] == "tool_use"]
    if len(set(ids)) < len(ids):
        faults.append("ids that are not unique")
    for number, message in enumerate(messages):
        blocks, role = message["content"], message["role"]
        results = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
        kinds = [b["type"] == "tool_result" for b in blocks]
        if not blocks:
            faults.append("empty content")
        if any(b["type"] == "text" and not b["text"].strip() for b in blocks):
            faults.append("blank text")
        if results != calls:
            faults.append(f"calls {calls} are answered by {results}")
        if kinds != sorted(kinds, reverse=True):
            faults.append("results are not first")
        if role == "system" and (
            roles[number - 1] != "user" or roles[number + 1 : number + 2] == ["user"]
        ):
            faults.append("a system message stands where none may")
        if number and role == roles[number - 1]:
            faults.append("two turns of one role")
        calls = [b["id"] for b in blocks if b["type"] == "tool_use"]
        if calls and role != "assistant":
            faults.append("a call of the user")
    return faults + ["a call without a result"] * bool(calls)


def test_id_that_comes_in_every_turn_takes_no_quadratic_time() -> None:
    turns = [told(tool_use("a")), asked(tool_result("a", "3C"))] * 10_000
    last = shim.conversation([asked(text_of("hi")), *turns])[-2:]  # this once took minutes
    assert last == [
        {"role": "assistant", "content": [tool_use("a_9999")]},
        {"role": "user", "content": [tool_result("a_9999", "3C")]},
    ]


CALL_IDS = ("a", "b", "a_1", "a_2", "a_3", "b_2")


def random_turns(chance: random.Random) -> List[Turn]:
    turns = []
    for number in range(chance.randrange(1, 9)):
        kind, id = chance.randrange(6), chance.choice(CALL_IDS)
        turns.append(
            [
                asked(f"u{number}"),
                told(f"a{number}"),
                told(
                    tool_use(id), *[tool_use(other) for other in CALL_IDS if chance.random() < 0.2]
                ),
                asked(tool_result(id, chance.choice(["18C", [text_of("21C")]]))),
                ruled(f"s{number}"),
                chance.choice([asked(), told(), asked(PICTURE)]),
            ][kind]
        )
    return turns


def test_conversation_of_any_turns_is_in_the_order_that_anthropic_takes() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        turns = random_turns(chance)
        before = copy.deepcopy(turns)
        if any(blocks for _, blocks in turns):
            messages = shim.conversation(turns)
            assert misordered(messages) == [], turns
            texts = [b["text"] for _, blocks in turns for b in blocks if b["type"] == "text"]
            assert all(text in json.dumps(messages) for text in texts), turns
        assert turns == before


# --- the rules of a model

THINKS: JSON = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
HI: JSON = {"role": "user", "content": [text_of("Hi")]}
HELLO: JSON = {"role": "assistant", "content": [text_of("Hello")]}
BE_BRIEF: JSON = {"role": "system", "content": [text_of("Be brief.")]}
CONTINUE: JSON = {"role": "user", "content": [text_of("Continue.")]}
FORMAT: JSON = {"type": "json_schema", "schema": {"type": "object", "properties": {}}}


def request_of(fields: JSON) -> JSON:
    """A request of 16,000 tokens with `fields`; None takes a field out."""
    whole = {"messages": [HI], "max_tokens": 16_000, **fields}
    return {name: value for name, value in whole.items() if value is not None}


def budget_of(tokens: int, **more: Any) -> JSON:
    return {"type": "enabled", "budget_tokens": tokens, **more}


ADAPTIVE: JSON = {"type": "adaptive"}
SUMMARIZED: JSON = {"type": "adaptive", "display": "summarized"}
DISABLED: JSON = {"type": "disabled"}
BETWEEN_TOOLS: JSON = {"type": "between_tools"}


def effort_of(level: str) -> JSON:
    return {"output_config": {"effort": level}}


# Model, what is asked, what goes up, what is named as changed.
MODEL_RULE_ROWS = [
    case("nothing to change", "claude-opus-5-5", {}, {}, ()),
    case(
        "no max_tokens: all that the model has",
        "claude-opus-5-5",
        {"max_tokens": None},
        {"max_tokens": 128_000},
        (),
    ),
    case(
        "no max_tokens on an older model",
        "claude-haiku-4-5",
        {"max_tokens": None},
        {"max_tokens": 64_000},
        (),
    ),
    case(
        "max_tokens over the limit",
        "claude-haiku-4-5",
        {"max_tokens": 64_001},
        {"max_tokens": 64_000},
        ("max_tokens",),
    ),
    case(
        "a small answer is not thought away: low effort",
        "claude-opus-5-5",
        {"max_tokens": 100},
        {"max_tokens": 100, **effort_of("low")},
        (),
    ),
    case(
        "a small answer is not thought away: between tools",
        "claude-sonnet-5-5",
        {"max_tokens": 100},
        {"max_tokens": 100, "thinking": BETWEEN_TOOLS},
        (),
    ),
    case(
        "a small answer is not thought away: off",
        "claude-haiku-5-5",
        {"max_tokens": 100},
        {"max_tokens": 100, "thinking": DISABLED},
        (),
    ),
    case(
        "a small answer of a model that thinks only when asked",
        "claude-opus-4-8",
        {"max_tokens": 100},
        {"max_tokens": 100},
        (),
    ),
    case(
        "a small answer with an effort that the client chose",
        "claude-opus-5-5",
        {"max_tokens": 100, **effort_of("high")},
        {"max_tokens": 100, **effort_of("high")},
        (),
    ),
    case(
        "thinking that cannot be off is little",
        "claude-opus-5-5",
        {"thinking": DISABLED},
        effort_of("low"),
        (),
    ),
    case(
        "thinking that can be off between tools only",
        "claude-sonnet-5-5",
        {"thinking": DISABLED},
        {"thinking": BETWEEN_TOOLS},
        (),
    ),
    case(
        "thinking between tools where it is not known and off anyway",
        "claude-opus-4-8",
        {"thinking": BETWEEN_TOOLS},
        {},
        (),
    ),
    case(
        "a thinking budget for a model that sets its own",
        "claude-opus-4-8",
        {"thinking": budget_of(5000)},
        {"thinking": SUMMARIZED},
        (),
    ),
    case(
        "a thinking budget keeps its display",
        "claude-opus-5-5",
        {"thinking": budget_of(5000, display="omitted")},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        (),
    ),
    case(
        "a thinking budget where it is taken",
        "claude-sonnet-4-6",
        {"thinking": budget_of(5000)},
        {"thinking": budget_of(5000)},
        (),
    ),
    case(
        "adaptive thinking on a model that wants a budget",
        "claude-haiku-4-5",
        {"thinking": SUMMARIZED, "max_tokens": 60_000},
        {"thinking": budget_of(16_384, display="summarized"), "max_tokens": 60_000},
        (),
    ),
    case(
        "effort is the budget of a model without efforts",
        "claude-haiku-4-5",
        {"thinking": {"type": "adaptive", "display": "omitted"}, **effort_of("low")},
        {"thinking": budget_of(2048, display="omitted")},
        (),
    ),
    case(
        "a budget is under max_tokens",
        "claude-haiku-4-5",
        {"thinking": ADAPTIVE, "max_tokens": 5000},
        {"thinking": budget_of(4999), "max_tokens": 5000},
        (),
    ),
    case(
        "no budget under 1,024 tokens",
        "claude-haiku-4-5",
        {"thinking": SUMMARIZED, "max_tokens": 1024},
        {"max_tokens": 1024},
        (),
    ),
    case(
        "a budget of the client's stays under max_tokens when that is lowered",
        "claude-haiku-4-5",
        {"thinking": budget_of(100_000), "max_tokens": 128_000},
        {"thinking": budget_of(63_999), "max_tokens": 64_000},
        ("max_tokens",),
    ),
    case(
        "an effort that is unknown goes to the next lower",
        "claude-opus-4-6",
        effort_of("xhigh"),
        effort_of("high"),
        (),
    ),
    case(
        "an effort on a model without efforts",
        "claude-haiku-4-5",
        effort_of("high"),
        {},
        ("effort",),
    ),
    case(
        "an effort beside a schema leaves the schema",
        "claude-haiku-4-5",
        {"output_config": {"effort": "high", "format": FORMAT}},
        {"output_config": {"format": FORMAT}},
        ("effort",),
    ),
    case(
        "an effort that is new is upstream's business",
        "claude-opus-5-5",
        effort_of("ultra"),
        effort_of("ultra"),
        (),
    ),
    case(
        "thinking that is off has at most high effort",
        "claude-opus-5",
        {"thinking": DISABLED, **effort_of("max")},
        {"thinking": DISABLED, **effort_of("high")},
        (),
    ),
    case(
        "#18: no sampling fields on new models",
        "claude-opus-4-7",
        {"temperature": 0.5, "top_p": 0.9, "top_k": 5},
        {},
        ("temperature", "top_p", "top_k"),
    ),
    case(
        "#18: temperature on an older model",
        "claude-opus-4-6",
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 0.5, "top_k": 5},
        (),
    ),
    case(
        "#18: not temperature and top_p both",
        "claude-sonnet-4-5",
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 0.5},
        ("top_p",),
    ),
    case(
        "#18: no sampling fields beside a thinking budget",
        "claude-sonnet-4-5",
        {"temperature": 0.5, "thinking": budget_of(2000)},
        {"thinking": budget_of(2000)},
        ("temperature",),
    ),
    case(
        "a forced call where it is taken",
        "claude-haiku-5-5",
        {"tool_choice": {"type": "any"}, "tools": [tool_of("a")]},
        {"tool_choice": {"type": "any"}, "tools": [tool_of("a")]},
        (),
    ),
    case(
        "#14: a forced call beside a thinking budget wins",
        "claude-sonnet-4-5",
        {"tool_choice": {"type": "tool", "name": "a"}, "thinking": budget_of(2000)},
        {"tool_choice": {"type": "tool", "name": "a"}},
        (),
    ),
    case(
        "a forced call where it is not taken becomes a request in words",
        "claude-opus-5-5",
        {"tool_choice": {"type": "tool", "name": "a"}},
        {
            "tool_choice": {"type": "auto"},
            "messages": [
                HI,
                {"role": "system", "content": [text_of("Answer this turn by calling the tool a.")]},
            ],
        },
        ("tool_choice",),
    ),
    case(
        "any forced call where it is not taken, one at a time",
        "claude-sonnet-5-5",
        {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "messages": [
                HI,
                {
                    "role": "system",
                    "content": [text_of("Answer this turn by calling one of the tools.")],
                },
            ],
        },
        ("tool_choice",),
    ),
    case(
        "#16: a system message where it is taken",
        "claude-opus-4-8",
        {"messages": [HI, BE_BRIEF]},
        {"messages": [HI, BE_BRIEF]},
        (),
    ),
    case(
        "#16: a system message where it is not taken stays in its place",
        "claude-sonnet-5",
        {"messages": [HI, BE_BRIEF, HELLO, HI]},
        {
            "messages": [
                {"role": "user", "content": [text_of("Hi"), reminder("Be brief.")]},
                HELLO,
                HI,
            ]
        },
        (),
    ),
    case(
        "#26: a started answer where it is not taken",
        "claude-opus-5-5",
        {"messages": [HI, HELLO]},
        {"messages": [HI, HELLO, CONTINUE]},
        (),
    ),
    case(
        "#26: a started answer where it is taken ends in no white space",
        "claude-haiku-4-5",
        {"messages": [HI, {"role": "assistant", "content": [text_of("a "), text_of("Hello \n")]}]},
        {"messages": [HI, {"role": "assistant", "content": [text_of("a "), text_of("Hello")]}]},
        (),
    ),
    case(
        "a schema where it is taken",
        "claude-opus-5-5",
        {"output_config": {"format": FORMAT}},
        {"output_config": {"format": FORMAT}},
        (),
    ),
    case(
        "twenty strict tools",
        "claude-opus-5-5",
        {"tools": [tool_of(f"t{n}", strict=True) for n in range(20)]},
        {"tools": [tool_of(f"t{n}", strict=True) for n in range(20)]},
        (),
    ),
    case(
        "more than twenty strict tools",
        "claude-opus-5-5",
        {"tools": [tool_of(f"t{n}", strict=True) for n in range(21)] + [tool_of("u")]},
        {"tools": [tool_of(f"t{n}") for n in range(21)] + [tool_of("u")]},
        ("strict",),
    ),
]


@pytest.mark.parametrize(("model", "fields", "expected", "changed"), MODEL_RULE_ROWS)
def test_model_rule(model: str, fields: JSON, expected: JSON, changed: Tuple[str, ...]) -> None:
    request = request_of(fields)
    before = copy.deepcopy(request)
    assert shim.adapted(request, shim.known_model(model)) == (request_of(expected), changed)
    assert request == before


def test_model_without_structured_outputs_is_asked_in_words() -> None:
    model = shim.known_model("claude-opus-5-5")._replace(structured_outputs=False)
    request = request_of(
        {"system": [text_of("Be brief.")], "output_config": {"effort": "low", "format": FORMAT}}
    )
    asked_for = '{"type":"object","properties":{}}'
    line = text_of(f"Answer with JSON that fits this JSON Schema: {asked_for}")
    expected = request_of({"system": [text_of("Be brief."), line], **effort_of("low")})
    assert shim.adapted(request, model) == (expected, ("response_format",))


def test_model_that_takes_no_strict_tools() -> None:
    model = shim.known_model("claude-opus-5-5")._replace(strict_tools=False)
    request = request_of({"tools": [tool_of("a", strict=True)]})
    expected = request_of({"tools": [tool_of("a")]})
    assert shim.adapted(request, model) == (expected, ("strict",))


def refused_by(id: str, request: JSON) -> List[str]:
    """What Anthropic refuses of a request, by the table of its models."""
    types, efforts, others = TAKEN[id]
    thinking = request.get("thinking", {}).get("type", "")
    config = request.get("output_config", {})
    budgeted, last = thinking == "enabled", request["messages"][-1]
    sampling = [field for field in ("temperature", "top_p", "top_k") if field in request]
    roles = [message["role"] for message in request["messages"]]
    off = thinking in ("disabled", "between_tools") and id not in OFF_AT_ANY_EFFORT
    limit = 64_000 if id.endswith("-4-5") else 128_000
    faults = {
        "max_tokens": not 0 < request["max_tokens"] <= limit,
        "thinking": bool(thinking) and thinking not in types.split(),
        "budget": budgeted
        and not 1024 <= request["thinking"]["budget_tokens"] < request["max_tokens"],
        "effort": "effort" in config and config["effort"] not in efforts.split(),
        "effort without thinking": off and config.get("effort") in ("xhigh", "max"),
        "sampling": bool(sampling) and ("sampling" not in others or budgeted),
        "temperature and top_p": id.endswith("-4-5") and {"temperature", "top_p"} <= set(sampling),
        "forced call": request.get("tool_choice", {}).get("type") in ("any", "tool")
        and ("forced" not in others or budgeted),
        "system message": "system" in roles and "system" not in others,
        "prefill": roles[-1] == "assistant" and ("prefill" not in others or budgeted),
        "prefill and format": roles[-1] == "assistant" and "format" in config,
        "final white space": last["role"] == "assistant" and last["content"][-1]["text"][-1] == " ",
    }
    return [*(name for name, fault in faults.items() if fault), *misordered(request["messages"])]


OFF_AT_ANY_EFFORT = ("claude-opus-4-8", "claude-opus-4-7", "claude-opus-4-6", "claude-sonnet-5",
                     "claude-sonnet-4-6")  # fmt: skip


def random_request(chance: random.Random) -> JSON:
    max_tokens = chance.choice([None, 1, 1024, 3000, 20_000, 64_000, 128_000, 200_000])
    budgets = [n for n in (1024, 2000, 10_000) if n < (max_tokens or 64_000)] or [1024]
    thinking = [None, ADAPTIVE, DISABLED, BETWEEN_TOOLS, budget_of(chance.choice(budgets))]
    if max_tokens and max_tokens <= 1024:
        thinking = thinking[:4]
    config = {
        "effort": chance.choice([None, *FIVE.split()]),
        "format": chance.choice([None, None, FORMAT]),
    }
    config = {name: value for name, value in config.items() if value is not None}
    ending = chance.choice([[], [BE_BRIEF], [HELLO], [{**HELLO, "content": [text_of("Hello ")]}]])
    started = chance.choice([[], [HI, HELLO], [HI, BE_BRIEF, HELLO]])
    return request_of(
        {
            "max_tokens": max_tokens,
            "messages": [*started, HI, *ending],
            "thinking": chance.choice(thinking),
            "output_config": config or None,
            "tool_choice": chance.choice([None, {"type": "any"}, {"type": "tool", "name": "a"}]),
            **{name: chance.choice([None, 0.5]) for name in ("temperature", "top_p", "top_k")},
        }
    )


def test_no_model_gets_what_it_refuses() -> None:
    chance = random.Random(1)
    faults: Dict[str, str] = {}
    for _ in range(3000):
        id, request = chance.choice(list(TAKEN)), random_request(chance)
        before = copy.deepcopy(request)
        given = shim.adapted(request, shim.known_model(id)).request
        for fault in refused_by(id, given):
            faults.setdefault(fault, f"{id}: {request} -> {given}")
        assert request == before
    assert faults == {}


def test_model_rules_change_nothing_that_they_made() -> None:
    chance = random.Random(1)
    for _ in range(1000):
        model, request = shim.known_model(chance.choice(list(TAKEN))), random_request(chance)
        once = shim.adapted(request, model).request
        assert shim.adapted(once, model) == (once, ())


@pytest.mark.parametrize(
    ("id", "message", "differences"),
    [
        case(
            "prefill",
            "claude-haiku-4-5",
            "This model does not support assistant message prefill. The conversation must end with "
            "a user message.",
            {"prefill": False},
        ),
        case(
            "a thinking budget",
            "claude-opus-4-6",
            '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" '
            'and "output_config.effort" to control thinking behavior.',
            {"thinking": frozenset({"adaptive", "disabled"})},
        ),
        case(
            "no thinking",
            "claude-opus-4-8",
            '"thinking.type.disabled" is not supported for this model. Thinking defaults to '
            "adaptive mode when not specified; ...",
            {"thinking": frozenset({"adaptive"}), "thinks_by_default": True},
        ),
        case(
            "adaptive thinking",
            "claude-opus-4-8",
            "adaptive thinking is not supported on this model",
            {"thinking": frozenset({"enabled", "disabled"})},
        ),
        case(
            "a forced call",
            "claude-opus-5",
            'tool_choice: type "tool" and "any" are not supported for this model.',
            {"forced_tool_choice": False},
        ),
        case(
            "#14: a forced call beside thinking",
            "claude-opus-5",
            "Thinking may not be enabled when tool_choice forces tool use.",
            {"forced_tool_choice": False},
        ),
        case(
            "a system message",
            "claude-opus-5",
            "role 'system' is not supported on this model",
            {"system_messages": False},
        ),
        case(
            "#18: temperature",
            "claude-opus-4-6",
            "`temperature` is deprecated for this model.",
            {"sampling": False},
        ),
        case(
            "#18: temperature and top_p",
            "claude-opus-4-6",
            "`temperature` and `top_p` cannot both be specified for this model. Please use only "
            "one.",
            {"temperature_and_top_p": False},
        ),
        case(
            "too many strict tools",
            "claude-opus-5",
            "Schema is too complex for compilation.",
            {"strict_tools": False},
        ),
    ],
)
def test_refusal_teaches_what_a_model_does_not_take(
    id: str, message: str, differences: JSON
) -> None:
    model = shim.known_model(id)
    learned = next(shim.models_after_refusal(model, message))
    assert learned == model._replace(**differences)
    assert learned not in list(shim.models_after_refusal(learned, message))  # nothing twice


@pytest.mark.parametrize(
    "message",
    [
        case("another error", "messages: Input should be a valid list"),
        case("too long a prompt", "prompt is too long: 210000 tokens > 200000 maximum"),
        case("a tool name", "tools.0.custom.name: String should have at most 128 characters"),
        case(
            "a schema with a field of the name temperature",
            "tools.0.custom.input_schema: JSON schema is invalid at properties.temperature",
        ),
        case("a tool of the name top_k", "tools: Tool names must be unique: top_k"),
        case("nothing", ""),
    ],
)
def test_refusal_of_something_else_teaches_nothing(message: str) -> None:
    assert list(shim.models_after_refusal(shim.known_model("claude-opus-4-6"), message)) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        case(
            "a block of another conversation",
            "messages.1.content.0: Invalid `signature` in `thinking` block. The block is bound to "
            "a different conversation ...",
            True,
        ),
        case(
            "a block that was changed",
            "messages.1.content.0: `thinking` or `redacted_thinking` blocks in the latest "
            "assistant message cannot be modified.",
            True,
        ),
        case(
            "#6: a block that is missing",
            "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found "
            "`tool_use`.",
            True,
        ),
        case("another error", "messages.1.content.0.text: Field required", False),
        case("a budget", "`max_tokens` must be greater than `thinking.budget_tokens`.", False),
    ],
)
def test_refuses_signature(message: str, expected: bool) -> None:
    assert shim.refuses_signature(message) is expected


REDACTED: JSON = {"type": "redacted_thinking", "data": "Emw"}


def test_without_thinking() -> None:
    call, answer = tool_use("a"), tool_result("a")
    request = request_of(
        {
            "messages": [
                HI,
                {"role": "assistant", "content": [THINKS]},
                HI,
                {"role": "assistant", "content": [THINKS, REDACTED, text_of("1"), call]},
                {"role": "user", "content": [answer]},
            ],
            "thinking": ADAPTIVE,
        }
    )
    before = copy.deepcopy(request)
    assert shim.without_thinking(request) == request_of(
        {
            "messages": [
                {"role": "user", "content": [text_of("Hi"), text_of("Hi")]},
                {"role": "assistant", "content": [text_of("1"), call]},
                {"role": "user", "content": [answer]},
            ],
            "thinking": ADAPTIVE,
        }
    )
    assert request == before


def test_without_thinking_there_is_no_budget_either() -> None:
    request = request_of({"thinking": budget_of(2000)})
    assert shim.without_thinking(request) == request_of({})


# --- prompt caching

FIVE_MINUTES: JSON = {"cache_control": {"type": "ephemeral"}}
ONE_HOUR: JSON = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
MARKED: JSON = {"role": "user", "content": [text_of("Hi", **FIVE_MINUTES)]}
LASTING: JSON = {"role": "user", "content": [text_of("Hi", **ONE_HOUR)]}
RESULT_MARKED: JSON = {
    "role": "user",
    "content": [tool_result("a", [text_of("1", **FIVE_MINUTES), text_of("2")])],
}

CACHE_LIMIT_ROWS = [
    case("no mark", {}, {}),
    case(
        "four marks",
        {
            "tools": [tool_of("a", **FIVE_MINUTES)],
            "system": [text_of("s", **FIVE_MINUTES)],
            "messages": [HI, MARKED],
            **FIVE_MINUTES,
        },
        {
            "tools": [tool_of("a", **FIVE_MINUTES)],
            "system": [text_of("s", **FIVE_MINUTES)],
            "messages": [HI, MARKED],
            **FIVE_MINUTES,
        },
    ),
    case(
        "of five marks the earliest of the messages goes",
        {
            "tools": [tool_of("a", **FIVE_MINUTES)],
            "system": [text_of("s", **FIVE_MINUTES)],
            "messages": [MARKED, HELLO, MARKED],
            **FIVE_MINUTES,
        },
        {
            "tools": [tool_of("a", **FIVE_MINUTES)],
            "system": [text_of("s", **FIVE_MINUTES)],
            "messages": [HI, HELLO, MARKED],
            **FIVE_MINUTES,
        },
    ),
    case(
        "marks inside results count",
        {"messages": [MARKED, HELLO, RESULT_MARKED, HELLO, MARKED, HELLO, MARKED, MARKED]},
        {"messages": [HI, HELLO, RESULT_MARKED, HELLO, MARKED, HELLO, MARKED, MARKED]},
    ),
    case(
        "six tools with marks",
        {"tools": [tool_of(name, **FIVE_MINUTES) for name in "abcdef"], "messages": [MARKED]},
        {
            "tools": [
                tool_of("a"),
                tool_of("b"),
                *[tool_of(name, **FIVE_MINUTES) for name in "cdef"],
            ],
            "messages": [HI],
        },
    ),
    case(
        "an hour before five minutes",
        {"system": [text_of("s", **ONE_HOUR)], "messages": [MARKED], **FIVE_MINUTES},
        {"system": [text_of("s", **ONE_HOUR)], "messages": [MARKED], **FIVE_MINUTES},
    ),
    case(
        "an hour behind five minutes makes all five minutes",
        {"system": [text_of("s", **FIVE_MINUTES)], "messages": [LASTING]},
        {"system": [text_of("s", **FIVE_MINUTES)], "messages": [MARKED]},
    ),
    case(
        "an hour at the top behind five minutes",
        {"messages": [MARKED], **ONE_HOUR},
        {"messages": [MARKED], **FIVE_MINUTES},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), CACHE_LIMIT_ROWS)
def test_limited_cache_marks(fields: JSON, expected: JSON) -> None:
    request = request_of(fields)
    before = copy.deepcopy(request)
    assert shim.limited_cache_marks(request) == request_of(expected)
    assert request == before


@pytest.mark.parametrize(("top", "last"), [(FIVE_MINUTES, LASTING), (ONE_HOUR, MARKED)])
def test_cache_mark_at_the_top_lasts_as_long_as_that_of_the_last_block(
    top: JSON, last: JSON
) -> None:
    request = shim.limited_cache_marks(request_of({"messages": [HI, HELLO, last], **top}))
    marks = [
        place.get("cache_control") for place in (request, request["messages"][2]["content"][0])
    ]
    assert None in marks or marks[0] == marks[1]
    assert marks != [None, None]


TALK: JSON = {"messages": [HI, HELLO, HI]}

PROMPT_CACHE_ROWS = [
    case("a single question would pay for nothing", "5m", {}, {}),
    case("a single question with a system prompt", "5m", {"system": [text_of("s")]}, None),
    case("off", "off", TALK, None),
    case("marks of the client's own stay alone", "5m", {"messages": [MARKED, HELLO, HI]}, None),
    case("a mark of the client's at the top", "1h", {**TALK, **FIVE_MINUTES}, None),
    case("a conversation", "5m", TALK, {**TALK, **FIVE_MINUTES}),
    case(
        "a conversation with a system prompt",
        "5m",
        {**TALK, "system": [text_of("r"), text_of("s")], "tools": [tool_of("a")]},
        {
            **TALK,
            "system": [text_of("r"), text_of("s", **FIVE_MINUTES)],
            "tools": [tool_of("a")],
            **FIVE_MINUTES,
        },
    ),
    case(
        "a question with tools",
        "1h",
        {"tools": [tool_of("a"), tool_of("b")]},
        {"tools": [tool_of("a"), tool_of("b", **ONE_HOUR)], **ONE_HOUR},
    ),
]


@pytest.mark.parametrize(("ttl", "fields", "expected"), PROMPT_CACHE_ROWS)
def test_prompt_cache(ttl: str, fields: JSON, expected: Optional[JSON]) -> None:
    request = request_of(fields)
    before = copy.deepcopy(request)
    marked = shim.with_prompt_cache(request, ttl)
    assert marked == request_of(fields if expected is None else expected)
    assert request == before


# --- from events to a message


@pytest.mark.parametrize(
    ("usage", "later", "expected"),
    [
        case(
            "what comes later counts, not the sum",
            {"input_tokens": 25, "output_tokens": 1},
            {"output_tokens": 15},
            {"input_tokens": 25, "output_tokens": 15},
        ),
        case(
            "S4-B23: null says nothing",
            {"input_tokens": 25, "cache_read_input_tokens": 7},
            {"input_tokens": None, "cache_read_input_tokens": None, "output_tokens": 3},
            {"input_tokens": 25, "cache_read_input_tokens": 7, "output_tokens": 3},
        ),
        case("zero is a number", {"input_tokens": 25}, {"input_tokens": 0}, {"input_tokens": 0}),
        case("no usage", {"input_tokens": 25}, None, {"input_tokens": 25}),
        case("usage of a wrong type", {"input_tokens": 25}, [1], {"input_tokens": 25}),
    ],
)
def test_merged_usage(usage: JSON, later: Any, expected: JSON) -> None:
    before = copy.deepcopy(usage)
    assert shim.merged_usage(usage, later) == expected
    assert usage == before


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        case(
            "#9: all that went in, once",
            {
                "input_tokens": 12,
                "cache_creation_input_tokens": 1500,
                "cache_read_input_tokens": 8000,
                "output_tokens": 90,
            },
            9512,
        ),
        case("nulls", {"input_tokens": 12, "cache_read_input_tokens": None}, 12),
        case("nothing", {}, 0),
        case("text", {"input_tokens": "12"}, 0),
    ],
)
def test_input_token_total(usage: JSON, expected: int) -> None:
    assert shim.input_token_total(usage) == expected


class MessageSink(shim.MessageAssembler):
    """An assembler that tells of failures, and counts what it got as raw bytes."""

    raw_runs = 0

    def feed_texts(self, run: List[bytes]) -> bytes:
        self.raw_runs += 1
        return super().feed_texts(run)

    def fail(self, error: shim.ShimError) -> bytes:
        return f"{error.status} {error.message}".encode()


def message_of(*content: JSON, **fields: Any) -> JSON:
    """What the events of the helpers make, with differences."""
    return {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-opus-5-5",
        "content": list(content),
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 25,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 15,
        },
        **fields,
    }


def ended(*events: JSON, stop_reason: str = "end_turn", **delta: Any) -> List[JSON]:
    """The events between a regular start and a regular end."""
    return [message_start(), *events, message_delta(stop_reason, **delta), MESSAGE_STOP]


def block_of(index: int, block: JSON, *deltas: JSON) -> List[JSON]:
    return [block_start(index, **block), *deltas, block_stop(index)]


SEARCH_RESULT: JSON = {
    "type": "web_search_tool_result",
    "tool_use_id": "srvtoolu_014",
    "content": [
        {
            "type": "web_search_result",
            "title": "W",
            "url": "https://w.example",
            "encrypted_content": "Ev0D..",
            "page_age": None,
        }
    ],
}
CITATION: JSON = {
    "type": "web_search_result_location",
    "url": "https://w.example",
    "title": "W",
    "encrypted_index": "Eo8B..",
    "cited_text": "It is 21\u00b0C",
}
STOPPED: JSON = {
    "type": "refusal",
    "category": "cyber",
    "explanation": "This request was declined.",
}
SERVER_CALL: JSON = {
    "type": "server_tool_use",
    "id": "srvtoolu_014",
    "name": "web_search",
    "input": {},
}

# The sequences of wire/anthropic.md 4, and what message each of them is.
TRANSCRIPTS = [
    case("4.2: text", TEXT_EVENTS, message_of(text_of("Hell\u00f6 \u4e16\U0001f600"))),
    case(
        "4.3, S3-B2, S4-B20: text, then two calls, one of them without arguments",
        ended(
            *block_of(0, text_of(""), text_delta(0, "Okay, let's check:")),
            *block_of(
                1,
                {"type": "tool_use", "id": "toolu_01T", "name": "get_weather", "input": {}},
                json_delta(1, ""),
                json_delta(1, '{"location":'),
                json_delta(1, ' "Z\u00fcri'),
                json_delta(1, 'ch, CH"}'),
            ),
            *block_of(
                2,
                {"type": "tool_use", "id": "toolu_01U", "name": "get_time", "input": {}},
                json_delta(2, ""),
            ),
            stop_reason="tool_use",
        ),
        message_of(
            text_of("Okay, let's check:"),
            {
                "type": "tool_use",
                "id": "toolu_01T",
                "name": "get_weather",
                "input": {"location": "Z\u00fcrich, CH"},
            },
            {"type": "tool_use", "id": "toolu_01U", "name": "get_time", "input": {}},
            stop_reason="tool_use",
        ),
    ),
    case(
        "4.4, S3-B18, S4-B13, S4-B14: thinking, redacted thinking, text",
        ended(
            *block_of(
                0,
                {"type": "thinking", "thinking": "", "signature": ""},
                block_delta(0, type="thinking_delta", thinking="1071 = "),
                block_delta(0, type="thinking_delta", thinking="2 \u00d7 462 + 147"),
                block_delta(0, type="signature_delta", signature="EqQBCgIYAhIM..."),
            ),
            *block_of(1, {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va..."}),
            *block_of(2, text_of(""), text_delta(2, "21")),
        ),
        message_of(
            {
                "type": "thinking",
                "thinking": "1071 = 2 \u00d7 462 + 147",
                "signature": "EqQBCgIYAhIM...",
            },
            {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va..."},
            text_of("21"),
        ),
    ),
    case(
        "4.4: thinking that is not shown has its signature",
        ended(
            *block_of(
                0,
                {"type": "thinking", "thinking": "", "signature": ""},
                block_delta(0, type="signature_delta", signature="Eq"),
            )
        ),
        message_of({"type": "thinking", "thinking": "", "signature": "Eq"}),
    ),
    case(
        "4.5, S3-B18: a server tool and citations; the last usage counts",
        [
            message_start(),
            *block_of(0, text_of(""), text_delta(0, "I look.")),
            *block_of(1, SERVER_CALL, json_delta(1, '{"query": "weather NYC"}')),
            *block_of(2, SEARCH_RESULT),
            *block_of(
                3,
                text_of("", citations=[]),
                block_delta(3, type="citations_delta", citation=CITATION),
                text_delta(3, "21\u00b0"),
                text_delta(3, "C."),
                block_delta(3, type="citations_delta", citation=CITATION),
            ),
            message_delta(
                "end_turn",
                {
                    "input_tokens": 10682,
                    "cache_creation_input_tokens": None,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 510,
                    "server_tool_use": {"web_search_requests": 1},
                },
            ),
            MESSAGE_STOP,
        ],
        message_of(
            text_of("I look."),
            {**SERVER_CALL, "input": {"query": "weather NYC"}},
            SEARCH_RESULT,
            text_of("21\u00b0C.", citations=[CITATION, CITATION]),
            usage={
                "input_tokens": 10682,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 510,
                "server_tool_use": {"web_search_requests": 1},
            },
        ),
    ),
    case(
        "4.6, S4-B8: a refusal before any answer",
        ended(stop_reason="refusal", stop_details=STOPPED),
        message_of(stop_reason="refusal", stop_details=STOPPED),
    ),
    case(
        "4.6: a refusal in the middle",
        ended(
            *block_of(0, text_of(""), text_delta(0, "First")),
            stop_reason="refusal",
            stop_details=STOPPED,
        ),
        message_of(text_of("First"), stop_reason="refusal", stop_details=STOPPED),
    ),
    case(
        "4.6: a pause",
        ended(*block_of(0, SERVER_CALL), stop_reason="pause_turn"),
        message_of(SERVER_CALL, stop_reason="pause_turn"),
    ),
    case(
        "4.6: another model takes over",
        ended(
            *block_of(0, text_of(""), text_delta(0, "a")),
            *block_of(1, {"type": "fallback", "from": {"model": "x"}, "to": {"model": "y"}}),
            *block_of(2, text_of(""), text_delta(2, "b")),
        ),
        message_of(
            text_of("a"),
            {"type": "fallback", "from": {"model": "x"}, "to": {"model": "y"}},
            text_of("b"),
        ),
    ),
    case(
        "S4-B10: a later block erases no earlier one",
        ended(*(e for n in range(9) for e in block_of(n, text_of(""), text_delta(n, f"t{n}")))),
        message_of(*[text_of(f"t{n}") for n in range(9)]),
    ),
    case(
        "S3-B6, S3-B7: a message_delta without a stop reason, then one with it",
        [
            message_start(),
            {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 7}},
            message_delta("stop_sequence", stop_sequence="END"),
            MESSAGE_STOP,
        ],
        message_of(stop_reason="stop_sequence", stop_sequence="END"),
    ),
    case(
        "a call that was cut stays as text",
        ended(
            *block_of(
                0,
                {"type": "tool_use", "id": "a", "name": "f", "input": {}},
                json_delta(0, '{"text": "\u00e9'),
            ),
            stop_reason="max_tokens",
        ),
        message_of(
            {
                "type": "tool_use",
                "id": "a",
                "name": "f",
                "input": {},
                "partial_json": '{"text": "\u00e9',
            },
            stop_reason="max_tokens",
        ),
    ),
    case(
        "a call whose arguments are no object stays as text",
        ended(
            *block_of(
                0,
                {"type": "tool_use", "id": "a", "name": "f", "input": {}},
                json_delta(0, "[1]"),
            )
        ),
        message_of(
            {"type": "tool_use", "id": "a", "name": "f", "input": {}, "partial_json": "[1]"}
        ),
    ),
    case(
        "a call that comes whole",
        ended(*block_of(0, {"type": "tool_use", "id": "a", "name": "f", "input": {"b": 1}})),
        message_of({"type": "tool_use", "id": "a", "name": "f", "input": {"b": 1}}),
    ),
    case(
        "text that has begun at the start of its block",
        ended(*block_of(0, text_of("Z\u00fc"), text_delta(0, "rich"))),
        message_of(text_of("Z\u00fcrich")),
    ),
    case(
        "events and deltas that are new are skipped",
        ended(
            {"type": "weather_report", "index": 0},
            *block_of(
                0,
                text_of(""),
                text_delta(0, "a"),
                block_delta(0, type="glitter_delta", glitter="*", text="no"),
                PING,
                text_delta(0, "b"),
            ),
            *block_of(1, {"type": "hologram", "beam": [1]}),
        ),
        message_of(text_of("ab"), {"type": "hologram", "beam": [1]}),
    ),
    case(
        "no usage at all",
        [
            {"type": "message_start", "message": {"id": "msg_01"}},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
            MESSAGE_STOP,
        ],
        {"id": "msg_01", "content": [], "usage": {}, "stop_reason": "end_turn"},
    ),
]


@CUTS
@LINE_ENDS
@pytest.mark.parametrize(("events", "expected"), TRANSCRIPTS)
def test_transcript(events: List[JSON], expected: JSON, line_end: bytes, cut: Any) -> None:
    sink = MessageSink()
    transform = shim.EventTransform(sink)
    raw = sse(*events).replace(b"\n", line_end)
    assert b"".join(map(transform.feed, cut(raw))) == b""
    assert sink.message == expected
    assert transform.complete
    assert transform.end() == b""
    assert transform.feed(sse({"type": "error", "error": {"message": "late"}})) == b""


@pytest.mark.parametrize(("events", "expected"), TRANSCRIPTS)
def test_transcript_that_is_cut_is_never_complete(events: List[JSON], expected: JSON) -> None:
    raw = sse(*events)
    for end in range(0, len(raw) - 1, 7):
        transform = shim.EventTransform(MessageSink())
        assert transform.feed(raw[:end]) == b""
        assert not transform.complete
        assert transform.end() == b"502 upstream ended in the middle of the answer"
        assert transform.end() == b""
        assert transform.feed(raw[end:]) == b""
        assert not transform.complete


def test_nothing_counts_behind_the_end_of_a_message() -> None:
    late = sse({"type": "error", "error": {"message": "late"}}, *TEXT_EVENTS)
    sink = MessageSink()
    transform = shim.EventTransform(sink)
    assert transform.feed(sse(*TEXT_EVENTS) + b"data: [DONE]\n\n" + late) == b""
    assert transform.complete
    assert sink.message is not None
    assert sink.message["content"] == [text_of("Hell\u00f6 \u4e16\U0001f600")]


@CUTS
@LINE_ENDS
@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        case(
            "S3-B13, S4-B23, #32: an error event is an error",
            sse(
                {"type": "error", "error": {"type": "overloaded_error", "message": "\u00dcberlast"}}
            ),
            "529 \u00dcberlast".encode(),
        ),
        case(
            "S3-B20: data that is no JSON",
            b"event: ping\ndata: {oops\xc3\xa9}\n\n",
            b"502 upstream sent an event that is not JSON",
        ),
        case(
            "data that is no UTF-8",
            b'data: {"type":"ping","\xff\xe9":1}\n\n',
            b"502 upstream sent an event that is not JSON",
        ),
        case(
            "data that is too deep",
            b"data: " + b"[" * 2000 + b"\n\n",
            b"502 upstream sent an event that is not JSON",
        ),
    ],
)
def test_transcript_that_fails_in_the_middle(
    broken: bytes, expected: bytes, line_end: bytes, cut: Any
) -> None:
    sink = MessageSink()
    transform = shim.EventTransform(sink)
    raw = sse(*TEXT_EVENTS[:5]) + broken + sse(*TEXT_EVENTS[5:])
    assert b"".join(map(transform.feed, cut(raw.replace(b"\n", line_end)))) == expected
    assert sink.open_text == "Hell\u00f6 \u4e16\U0001f600"
    assert not transform.complete
    assert transform.end() == b""


@pytest.mark.parametrize(
    "strange",
    [
        case("a list", b"data: [1]\n\n"),
        case("a number", b"data: 5\n\n"),
        case("null", b"data: null\n\n"),
        case("S3-B12: [DONE] of another dialect is no regular end", b"data: [DONE]\n\n"),
        case("an empty object", b"data: {}\n\n"),
        case("an end without a start", sse(MESSAGE_STOP)),
        case("a block without a start", sse(*block_of(0, text_of("a"), text_delta(0, "b")))),
        case("empty data", b"data:\n\n"),
        case("a comment", b": hi\n\n"),
    ],
)
def test_transcript_that_has_not_begun_is_never_complete(strange: bytes) -> None:
    transform = shim.EventTransform(MessageSink())
    transform.feed(strange)
    assert not transform.complete
    assert b"502 upstream" in transform.end() or strange == b"data: [DONE]\n\n"


EVENT_WORDS = (
    "type index message content_block delta usage error content citations text thinking input id "
    "stop_reason input_tokens partial_json signature"
).split()
EVENT_PARTS = {
    "content_block": "text thinking tool_use server_tool_use redacted_thinking",
    "delta": "text_delta thinking_delta input_json_delta signature_delta citations_delta",
}
EVENT_TYPES = (
    "message_start content_block_start content_block_delta content_block_stop message_delta "
    "message_stop"
).split()


def test_events_of_wrong_types_at_any_depth_crash_nothing() -> None:
    chance = random.Random(1)
    crashes = set()
    for _ in range(1500):
        transform, joiner = shim.EventTransform(MessageSink()), shim.TurnJoiner()
        events: List[JSON] = [message_start()] if chance.random() < 0.7 else []
        for _ in range(chance.randrange(1, 6)):
            event = random_object(chance, EVENT_WORDS)
            for part, types in EVENT_PARTS.items():
                if chance.random() < 0.6:
                    event[part] = random_object(chance, EVENT_WORDS)
                    event[part]["type"] = chance.choice(types.split())
            events.append({**event, "type": chance.choice(EVENT_TYPES)})
        crashes.update(crash_of(transform.feed, sse(event)) for event in events)
        crashes.update(crash_of(joiner.feed, event) for event in events)
    assert crashes == {""}


# --- text as bytes


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        case("ASCII is itself", b'{\\"a\\":b\\n\x7f}', b'{\\"a\\":b\\n\x7f}'),
        case("two bytes", "caf\u00e9".encode(), b"caf\\u00e9"),
        case("three bytes", "\u4e16\u754c!".encode(), b"\\u4e16\\u754c!"),
        case("four bytes", "a\U0001f600b".encode(), b"a\\ud83d\\ude00b"),
        case("line separators", "\u2028\u2029\x85".encode(), b"\\u2028\\u2029\\u0085"),
        case("not UTF-8", b"caf\xe9", None),
        case("half a character", b"caf\xc3", None),
        case("a surrogate", b"\xed\xa0\x80", None),
        case("too long a form", b"\xc0\x80", None),
    ],
)
def test_ascii_texts(run: bytes, expected: Optional[bytes]) -> None:
    assert shim.ascii_texts([run]) == ([] if expected is None else [expected])


DELTA_START = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"'
DELTA_LINE = b"event: content_block_delta\ndata: "


@pytest.mark.parametrize(
    ("raw", "spliced", "text"),
    [
        case("as Anthropic writes it", DELTA_LINE + DELTA_START + b'a"}}\n\n', True, "a"),
        case("padded with spaces", DELTA_LINE + DELTA_START + b'a"}      }\n\n', True, "a"),
        case(
            "escapes",
            DELTA_LINE + DELTA_START + rb'\"\\\/\n\u00e9"}}' + b"\n\n",
            True,
            '"\\/\n\u00e9',
        ),
        case("UTF-8", DELTA_LINE + DELTA_START + b'\xc3\xa9"}}\n\n', True, "\u00e9"),
        case(
            "braces and quotes in the text",
            DELTA_LINE + DELTA_START + rb'\"}}"}}' + b"\n\n",
            True,
            '"}}',
        ),
        case(
            "a pair of escapes",
            DELTA_LINE + DELTA_START + rb'\ud83d\ude00"}}' + b"\n\n",
            True,
            "\U0001f600",
        ),
        case(
            "a later block",
            DELTA_LINE + DELTA_START.replace(b":0", b":12") + b'a"}}\n\n',
            True,
            "a",
        ),
        case("no event line", b"data: " + DELTA_START + b'a"}}\n\n', False, "a"),
        case(
            "no space after the colon",
            (DELTA_LINE + DELTA_START + b'a"}}\n\n').replace(b": ", b":"),
            False,
            "a",
        ),
        case(
            "a space in the JSON",
            DELTA_LINE + DELTA_START.replace(b",", b", ") + b'a"}}\n\n',
            False,
            "a",
        ),
        case("another member", DELTA_LINE + DELTA_START + b'a","x":1}}\n\n', False, "a"),
        case("a member behind", DELTA_LINE + DELTA_START + b'a"},"x":1}\n\n', False, "a"),
        case(
            "another order",
            DELTA_LINE
            + b'{"index":0,"type":"content_block_delta",'
            + b'"delta":{"text":"a","type":"text_delta"}}\n\n',
            False,
            "a",
        ),
        case("more data lines", DELTA_LINE + DELTA_START + b'a"}\ndata: }\n\n', False, "a"),
        case(
            "an escaped name",
            DELTA_LINE + DELTA_START.replace(b'"text"', b'"te\\u0078t"') + b'a"}}\n\n',
            False,
            "a",
        ),
    ],
)
def test_text_delta_is_spliced_only_when_it_is_as_anthropic_writes_it(
    raw: bytes, spliced: bool, text: str
) -> None:
    sink = MessageSink()
    transform = shim.EventTransform(sink)
    assert transform.feed(sse(message_start(), block_start(0, type="text", text=""))) == b""
    assert transform.feed(raw) == b""
    assert (sink.raw_runs, sink.open_text) == (int(spliced), text)


def test_text_deltas_of_one_burst_are_one_run() -> None:
    sink = MessageSink()
    transform = shim.EventTransform(sink)
    deltas = [text_delta(0, f"{n} \u00e9") for n in range(50)]
    transform.feed(
        sse(message_start(), block_start(0, type="text", text=""), *deltas, PING, *deltas)
    )
    assert sink.raw_runs == 2
    assert sink.open_text == "".join(f"{n} \u00e9" for n in [*range(50), *range(50)])


@pytest.mark.parametrize(
    ("between", "runs", "text"),
    [
        case("a delta of another index", DELTA_LINE + b'{"index":1}\n\n', 2, "ab"),
        case(
            "a text delta of another index",
            DELTA_LINE + DELTA_START.replace(b":0", b":1") + b'x"}}\n\n',
            2,
            "axb",
        ),
        case("a start in an event that has another", DELTA_LINE, 1, None),
        case("a start after another line", b"id: 5\n", 1, "ab"),
        case("a start alone", DELTA_LINE + DELTA_START + b"\n\n", 0, None),
        case("a NUL", b"event: \x00\n\n", 2, "ab"),
        case("an empty text", DELTA_LINE + DELTA_START + b'"}}\n\n', 1, "ab"),
        case("a line after the data", (DELTA_LINE + DELTA_START + b'x"}}\nb"}}\n\n'), 0, "axb"),
        case("a NUL in a text", DELTA_LINE + DELTA_START + b'\x00"}}\n\n', 0, None),
    ],
)
def test_what_stands_between_text_deltas_is_read_as_it_came(
    between: bytes, runs: int, text: Optional[str]
) -> None:
    sink = MessageSink()
    transform = shim.EventTransform(sink)
    transform.feed(sse(message_start(), block_start(0, type="text", text="")))
    first, last = (DELTA_LINE + DELTA_START + piece + b'"}}\n\n' for piece in (b"a", b"b"))
    transform.feed(first + between + last)
    assert (sink.raw_runs, transform.failed) == (runs, text is None)
    assert text is None or sink.open_text == text


def test_text_deltas_that_come_one_by_one_take_no_quadratic_time() -> None:
    sink = MessageSink()
    transform = shim.EventTransform(sink)
    transform.feed(sse(message_start(), block_start(0, type="text", text="")))
    lines = (DELTA_LINE + DELTA_START.replace(b":0", b":%d" % n) for n in (0, 1))
    began = time.process_time()
    transform.feed(b"\n\n" * 500_000 + b"".join(line + b'x"}}\n\n' for line in lines) * 5_000)
    assert time.process_time() - began < 5.0  # it once took 12
    assert sink.raw_runs == 5_000  # those of the first start


HOSTILE_TEXT = [
    b"Hello", b" ", b"", b"\\n", b'\\"', b"\\\\", b"\\/", b"\\u00e9", b"\\u0000", b"\\u2028",
    b"\\ud83d", b"\\ude00", b"\\ud83d\\ude00", b"\\uD83D\\uDE00", "\u00e9".encode(),
    "\u4e16".encode(), "\U0001f600".encode(), "\u2028".encode(), b"\x7f", b"}", b'\\"}}', b"data: ",
    b"event: content_block_delta", b"[DONE]", b"\\\\u00e9", b"{", b"\\b\\f\\r\\t", b"&<>",
]  # fmt: skip
BROKEN_TEXT = [
    b"\\x", b"\\u12", b"\\u12g4", b"\\", b"\t", b"\x00", b"\x1f", b"\n", b"\xff", b"\xed\xa0\x80",
    b"\xc3", b'"', b"\\ud83d\\u", b"\\U0001", b"\xc0\x80", b"\n\n", b"\r",
]  # fmt: skip


INPUT_DELTA = b'"input_json_delta","partial_json"'
FILLED_BLOCKS: List[Tuple[bytes, JSON]] = [
    (b'"text_delta","text"', text_of("")),
    (b'"thinking_delta","thinking"', {"type": "thinking", "thinking": "", "signature": ""}),
    (INPUT_DELTA, {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
    (INPUT_DELTA, {**SERVER_CALL, "input": {}}),
]


def hostile_delta(chance: random.Random, kind: bytes) -> bytes:
    """One delta of a kind, in a form that Anthropic may or may not use, mostly valid."""
    text = b"".join(chance.choices(HOSTILE_TEXT, k=chance.randrange(5)))
    if chance.random() < 0.05:
        text += chance.choice(BROKEN_TEXT) + chance.choice(HOSTILE_TEXT)
    padding = b" " * chance.choice([0, 0, 0, 1, 7])
    if chance.random() < 0.1:
        kind = chance.choice(FILLED_BLOCKS)[0]  # which is not for the block
    start = DELTA_START.replace(b'"text_delta","text"', kind)
    plain = DELTA_LINE + start + text + b'"}' + padding + b"}\n\n"
    type_, _, member = kind.partition(b",")
    other = (
        b'{"index":0,"delta":{%b:"' % member
        + text
        + b'","type":%b},"type":"content_block_delta"}' % type_
    )
    return chance.choice(
        [
            plain,
            plain,
            plain,
            plain,
            plain.replace(b'"index":0', b'"index" : 0'),
            plain.replace(b"data: ", b"data:", 1),
            plain.replace(b"event: content_block_delta\n", b""),
            DELTA_LINE + other + padding + b"\n\n",
            plain.replace(b"\n", b"\r\n"),
            b": comment\n\n" + plain,
            plain[:-1] + b"id: 5\n\n",
            sse(PING),
        ]
    )


def hostile_answer(chance: random.Random) -> bytes:
    """A message of some blocks, of which each is filled by deltas in any form."""
    events = [sse(message_start())]
    for number in range(chance.randrange(1, 4)):
        kind, block = chance.choice(FILLED_BLOCKS)
        deltas = [hostile_delta(chance, kind) for _ in range(chance.randrange(1, 6))]
        filled = b"".join(deltas).replace(b'"index":0', b'"index":%d' % number)
        events += [sse(block_start(number, **block)), filled, sse(block_stop(number))]
    return b"".join([*events, sse(message_delta("end_turn"), MESSAGE_STOP)])


class Unspliced:
    """An encoder without its short cut."""

    takes = property(lambda self: b"", lambda self, value: None)


class PlainChat(Unspliced, shim.ChatStreamEncoder):
    """That of chat completions."""


class PlainResponses(Unspliced, shim.ResponsesStreamEncoder):
    """That of Responses."""


class PlainSink(Unspliced, MessageSink):
    """The assembler."""


def random_cuts(raw: bytes, chance: random.Random) -> List[bytes]:
    ends = sorted(chance.randrange(len(raw)) for _ in range(chance.randrange(4)))
    return [raw[start:end] for start, end in zip([0, *ends], [*ends, len(raw)])]


@pytest.mark.parametrize(
    ("encoder", "plain", "reply"),
    [
        case("chat", shim.ChatStreamEncoder, PlainChat, shim.ChatReply()),
        case("functions", shim.ChatStreamEncoder, PlainChat, shim.ChatReply(legacy=True)),
        case("JSON", shim.ChatStreamEncoder, PlainChat, shim.ChatReply(json_object=True)),
        case(
            "Responses",
            shim.ResponsesStreamEncoder,
            PlainResponses,
            shim.ResponsesReply("resp_1"),
        ),
        case(
            "Responses in JSON",
            shim.ResponsesStreamEncoder,
            PlainResponses,
            shim.ResponsesReply("resp_1", json_object=True),
        ),
    ],
)
def test_spliced_deltas_parse_to_the_same_as_parsed_ones(
    encoder: Any, plain: Any, reply: Any
) -> None:
    chance = random.Random(1)
    whole_answers = 0
    for _ in range(1000):
        raw = hostile_answer(chance)
        fast, slow = shim.EventTransform(encoder(reply)), shim.EventTransform(plain(reply))
        spliced = b"".join(map(fast.feed, random_cuts(raw, chance))) + fast.end()
        parsed = slow.feed(raw) + slow.end()
        assert whole_characters(spliced) == whole_characters(parsed), raw
        assert fast.complete == slow.complete
        whole_answers += fast.complete
    assert 400 < whole_answers < 950  # both kinds were met


def whole_characters(stream: bytes) -> List[Any]:
    """The events, in which halves of a pair that meet are one character, as they are in JSON."""
    return [shim.loads(shim.dumps(data)) for data in chunks(stream)]


def test_spliced_deltas_make_the_same_message_as_parsed_ones() -> None:
    chance = random.Random(2)
    for _ in range(1000):
        raw = hostile_answer(chance)
        fast, slow = MessageSink(), PlainSink()
        ends = [shim.EventTransform(sink) for sink in (fast, slow)]
        told_of = [b"".join(map(end.feed, random_cuts(raw, chance))) + end.end() for end in ends]
        assert told_of[0] == told_of[1], raw
        assert slow.raw_runs == 0
        assert shim.loads(shim.dumps(fast.message)) == shim.loads(shim.dumps(slow.message)), raw


# --- turns that pause

PAUSED = ended(
    *block_of(0, text_of(""), text_delta(0, "I look.")),
    *block_of(1, SERVER_CALL, json_delta(1, '{"query": "a"}')),
    stop_reason="pause_turn",
    usage={
        "input_tokens": 100,
        "output_tokens": 20,
        "cache_read_input_tokens": None,
        "server_tool_use": {"web_search_requests": 3},
    },
)
PAUSED_CONTENT: List[JSON] = [text_of("I look."), {**SERVER_CALL, "input": {"query": "a"}}]
GOES_ON = [
    message_start(id="msg_02"),
    *block_of(0, SEARCH_RESULT),
    PING,
    *block_of(1, text_of(""), text_delta(1, "Found.")),
    message_delta(
        "end_turn",
        {"input_tokens": 150, "output_tokens": 30, "server_tool_use": {"web_search_requests": 1}},
    ),
    MESSAGE_STOP,
]


def joined(joiner: shim.TurnJoiner, events: List[JSON]) -> List[JSON]:
    before = copy.deepcopy(events)
    handed = [joiner.feed(event) for event in events]
    assert events == before
    return [event for event in handed if event is not None]


def test_turn_that_does_not_pause_is_handed_on() -> None:
    joiner = shim.TurnJoiner()
    usage = {
        "input_tokens": 25,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 15,
    }
    expected = [*TEXT_EVENTS[:-2], message_delta("end_turn", usage), MESSAGE_STOP]
    assert joined(joiner, TEXT_EVENTS) == expected
    assert not joiner.paused


def test_turn_that_pauses_becomes_one_message() -> None:
    joiner = shim.TurnJoiner()
    assert joined(joiner, PAUSED) == PAUSED[:-2]  # neither the stop reason nor the end
    assert joiner.paused
    request = request_of({"tools": [{"type": "web_search_20260318", "name": "web_search"}]})
    before = copy.deepcopy(request)
    resumed = joiner.resumed(request)
    assert resumed == {
        **before,
        "messages": [HI, {"role": "assistant", "content": PAUSED_CONTENT}],
    }
    assert request == before
    assert joined(joiner, GOES_ON) == [
        *block_of(2, SEARCH_RESULT),
        PING,
        *block_of(3, text_of(""), text_delta(3, "Found.")),
        message_delta(
            "end_turn",
            {
                "input_tokens": 250,
                "output_tokens": 50,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "server_tool_use": {"web_search_requests": 4},
            },
        ),
        MESSAGE_STOP,
    ]
    assert not joiner.paused


def test_turn_that_pauses_twice() -> None:
    joiner = shim.TurnJoiner()
    joined(joiner, PAUSED)
    once = joiner.resumed(request_of({}))
    assert joined(joiner, PAUSED) == [
        *block_of(2, text_of(""), text_delta(2, "I look.")),
        *block_of(3, SERVER_CALL, json_delta(3, '{"query": "a"}')),
    ]
    before = copy.deepcopy(once)
    twice = joiner.resumed(once)
    content = [*PAUSED_CONTENT, *PAUSED_CONTENT]
    assert twice["messages"] == [HI, {"role": "assistant", "content": content}]
    assert once == before
    handed = joined(joiner, GOES_ON)
    assert [e["index"] for e in handed if "index" in e] == [4, 4, 5, 5, 5]
    assert handed[-2]["usage"]["output_tokens"] == 70
    assert handed[-2]["usage"]["server_tool_use"] == {"web_search_requests": 7}


def test_error_in_a_turn_is_handed_on() -> None:
    joiner = shim.TurnJoiner()
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assert joined(joiner, [*TEXT_EVENTS[:4], error]) == [*TEXT_EVENTS[:4], error]


# ----------------------------------------------------------------------
# 6. Chat Completions <-> Messages
# ----------------------------------------------------------------------
# Numbers such as #3 are the rows of translation bugs in wire/openai.md 8; S3-B4 and the like are
# the bugs of the systems before us.

OPUS = "claude-opus-5-5"
CHAT_HI: JSON = {"role": "user", "content": "hi"}
MARK: JSON = {"type": "ephemeral"}
PNG = "iVBORw0KGgo="
JPEG = "/9j/4A=="
GIF = "R0lGODlh"
WEBP = "UklGRgAAAABXRUJQ"
PDF = "JVBERi0xLjc="
NO_PARAMETERS: JSON = {"type": "object", "properties": {}}


def wanted(*messages: JSON, **fields: Any) -> JSON:
    """A Messages request, written out but for what is in each of them."""
    return {"model": OPUS, "messages": list(messages), "stream": True, **fields}


def says(text: str, **more: Any) -> JSON:
    return {"type": "text", "text": text, **more}


def user(*blocks: Union[str, JSON]) -> JSON:
    """A user's turn; a string stands for a text block."""
    return {"role": "user", "content": [says(b) if isinstance(b, str) else b for b in blocks]}


def assistant(*blocks: Union[str, JSON]) -> JSON:
    return {**user(*blocks), "role": "assistant"}


def use(id: str, name: str = "f", **input: Any) -> JSON:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def result(id: str, content: Any = "18C", **more: Any) -> JSON:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def no_result(id: str) -> JSON:
    return result(id, "(no result)", is_error=True)


def image(media_type: str, data: str) -> JSON:
    source = {"type": "base64", "media_type": media_type, "data": data}
    return {"type": "image", "source": source}


def call(id: str, arguments: Any = "{}", name: str = "f", **more: Any) -> JSON:
    """One of a chat message's `tool_calls`."""
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function, **more}


def calls(*tool_calls: JSON, content: Any = None) -> JSON:
    return {"role": "assistant", "content": content, "tool_calls": list(tool_calls)}


def answer(id: str, content: Any = "18C", **more: Any) -> JSON:
    """A chat message of role `tool`."""
    return {"role": "tool", "tool_call_id": id, "content": content, **more}


def function(name: str = "f", **more: Any) -> JSON:
    """One of a chat body's `tools`."""
    return {"type": "function", "function": {"name": name, **more}}


def tool(name: str = "f", **more: Any) -> JSON:
    """One of a Messages request's `tools`, without parameters."""
    return {"name": name, "input_schema": NO_PARAMETERS, **more}


def chat(*messages: JSON, **fields: Any) -> JSON:
    return {"model": "opus", "messages": list(messages), **fields}


def requested(body: JSON) -> JSON:
    return shim.messages_request_from_chat(body, OPUS).finished()


def faults(request: JSON) -> List[str]:
    """What Anthropic would refuse in a request, by wire/anthropic.md 1.6, 1.7, 12 and 13."""
    found = []
    ids: List[str] = []
    waiting: List[str] = []
    if not request["messages"] or request["messages"][0]["role"] != "user":
        found.append("does not start with a user message")
    for turn in request["messages"]:
        results = [b["tool_use_id"] for b in turn["content"] if b["type"] == "tool_result"]
        if results != waiting or any(
            b["type"] != "tool_result" for b in turn["content"][: len(results)]
        ):
            found.append(f"calls {waiting}, results {results}")
        waiting = [b["id"] for b in turn["content"] if b["type"] == "tool_use"]
        ids += waiting
        if not turn["content"]:
            found.append("a message without content")
        for block in turn["content"]:
            found += ["blank text"] if block["type"] == "text" and not block["text"].strip() else []
            found += ["input"] if not isinstance(block.get("input", {}), dict) else []
    names = [t["name"] for t in request.get("tools", ())]
    found += ["calls without results"] if waiting else []
    found += ["duplicate ids"] if len(set(ids)) < len(ids) else []
    found += ["duplicate tools"] if len(set(names)) < len(names) else []
    found += [i for i in ids if not re.fullmatch("[a-zA-Z0-9_-]+", i)]
    found += [n for n in names if not re.fullmatch("[a-zA-Z0-9_-]{1,128}", n)]
    found += ["too many marks"] if json.dumps(request).count('"cache_control": {"') > 4 else []
    found += ["a choice without tools"] if "tool_choice" in request and not names else []
    return found


# --- (a) requests: roles, order, tools in the history

ROLES = [
    case("a string becomes one text block", chat(CHAT_HI), wanted(user("hi"))),
    case(
        "leading system and developer messages become system blocks, one each (S4-B22)",
        chat({"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, CHAT_HI),
        wanted(user("hi"), system=[says("A"), says("B")]),
    ),
    case(
        "a system message of parts keeps its parts and cache marks (S4-B22)",
        chat(
            {
                "role": "system",
                "content": [
                    {"type": "text", "text": "A", "cache_control": MARK},
                    {"type": "text", "text": "B"},
                ],
            },
            CHAT_HI,
        ),
        wanted(user("hi"), system=[says("A", cache_control=MARK), says("B")]),
    ),
    case(
        "an empty system message is left out",
        chat({"role": "system", "content": ""}, CHAT_HI),
        wanted(user("hi")),
    ),
    case(
        "a system message before an assistant's stays in its place (#16)",
        chat(
            CHAT_HI,
            {"role": "system", "content": "S"},
            {"role": "assistant", "content": "a"},
            CHAT_HI,
        ),
        wanted(
            user("hi"),
            {"role": "system", "content": [says("S")]},
            assistant("a"),
            user("hi"),
        ),
    ),
    case(
        "a system message at the end stays in its place",
        chat(CHAT_HI, {"role": "developer", "content": "S"}),
        wanted(user("hi"), {"role": "system", "content": [says("S")]}),
    ),
    case(
        "a system message between two user messages becomes a reminder between them",
        chat(CHAT_HI, {"role": "system", "content": "S"}, {"role": "user", "content": "more"}),
        wanted(user("hi", "<system-reminder>\nS\n</system-reminder>", "more")),
    ),
    case(
        "a system message after an assistant's becomes a reminder of the user's turn",
        chat(
            CHAT_HI,
            {"role": "assistant", "content": "a"},
            {"role": "system", "content": "S"},
            CHAT_HI,
        ),
        wanted(
            user("hi"),
            assistant("a"),
            user("<system-reminder>\nS\n</system-reminder>", "hi"),
        ),
    ),
    case(
        "messages of one role become one",
        chat(
            CHAT_HI,
            {"role": "user", "content": "there"},
            {"role": "assistant", "content": "a"},
            {"role": "assistant", "content": "b"},
            CHAT_HI,
        ),
        wanted(user("hi", "there"), assistant("a", "b"), user("hi")),
    ),
    case(
        "a conversation that an assistant starts gets a user's turn before it",
        chat({"role": "assistant", "content": "a"}, CHAT_HI),
        wanted(user("(The conversation starts here.)"), assistant("a"), user("hi")),
    ),
    case(
        "a trailing assistant message stays last until the model is known",
        chat(CHAT_HI, {"role": "assistant", "content": "I am "}),
        wanted(user("hi"), assistant("I am ")),
    ),
    case(
        "a name goes before the text",
        chat({"role": "user", "name": "Jane", "content": "hi"}),
        wanted(user("Jane: hi")),
    ),
    case(
        "a refusal is text, as string and as part",
        chat(
            CHAT_HI,
            {"role": "assistant", "content": None, "refusal": "No."},
            CHAT_HI,
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}]},
            CHAT_HI,
        ),
        wanted(user("hi"), assistant("No."), user("hi"), assistant("Never."), user("hi")),
    ),
    case(
        "blank messages and parts go (#4)",
        chat(
            CHAT_HI,
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "  \n"},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": []},
            {
                "role": "user",
                "content": [{"type": "text", "text": ""}, {"type": "text", "text": "b"}],
            },
        ),
        wanted(user("hi", "b")),
    ),
    case(
        "white space in text that is not blank is the client's",
        chat({"role": "user", "content": " \n hi\t"}),
        wanted(user(" \n hi\t")),
    ),
    case(
        "parts may be plain strings, without type, or in the names of Responses",
        chat(
            {
                "role": "user",
                "content": ["a", {"text": "b"}, {"type": "input_text", "text": "c"}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "d"}]},
            CHAT_HI,
        ),
        wanted(user("a", "b", "c"), assistant("d"), user("hi")),
    ),
    case(
        "Responses items in `input` are a conversation, too (#20)",
        {
            "input": [
                {"role": "developer", "content": "S"},
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "a"}],
                },
                {"type": "reasoning", "summary": []},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'},
                {"type": "custom_tool_call", "call_id": "c2", "name": "p", "input": "x"},
                {"type": "function_call_output", "call_id": "c1", "output": "18C"},
                {
                    "type": "custom_tool_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "ok"}],
                },
            ]
        },
        wanted(
            user("a"),
            assistant(use("c1", a=1), use("c2", "p", input="x")),
            user(result("c1"), result("c2", [says("ok")])),
            system=[says("S")],
        ),
    ),
    case("a string in `input` is a user message", {"input": "hi"}, wanted(user("hi"))),
    case(
        "a body of Responses keeps its instructions and its limit",
        {"input": "hi", "instructions": "Be brief.", "max_output_tokens": 100},
        wanted(user("hi"), system=[says("Be brief.")], max_tokens=100),
    ),
    case(
        "messages win over input",
        {"messages": [CHAT_HI], "input": "other"},
        wanted(user("hi")),
    ),
]

HISTORY = [
    case(
        "parallel results become one user message in the order of the calls (#3, S4-B22)",
        chat(
            CHAT_HI,
            calls(call("c1", '{"city": "Paris"}'), call("c2"), content="Checking."),
            answer("c2", "21C"),
            answer("c1", "18C"),
            {"role": "user", "content": "Thanks"},
        ),
        wanted(
            user("hi"),
            assistant("Checking.", use("c1", city="Paris"), use("c2")),
            user(result("c1", "18C"), result("c2", "21C"), "Thanks"),
        ),
    ),
    case(
        "user images between tool messages go behind all results (Goose)",
        chat(
            CHAT_HI,
            calls(call("c1"), call("c2")),
            answer("c1"),
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
                ],
            },
            answer("c2"),
            {"role": "user", "content": "see"},
        ),
        wanted(
            user("hi"),
            assistant(use("c1"), use("c2")),
            user(result("c1"), result("c2"), image("image/png", PNG), "see"),
        ),
    ),
    case(
        "a system message between results goes behind them",
        chat(
            CHAT_HI,
            calls(call("c1"), call("c2")),
            answer("c1"),
            {"role": "system", "content": "S"},
            answer("c2"),
        ),
        wanted(
            user("hi"),
            assistant(use("c1"), use("c2")),
            user(result("c1"), result("c2"), "<system-reminder>\nS\n</system-reminder>"),
        ),
    ),
    case(
        "one call after the other stays so",
        chat(CHAT_HI, calls(call("c1")), answer("c1"), calls(call("c2")), answer("c2")),
        wanted(
            user("hi"),
            assistant(use("c1")),
            user(result("c1")),
            assistant(use("c2")),
            user(result("c2")),
        ),
    ),
    case(
        "calls of assistant messages in a row are one turn",
        chat(CHAT_HI, calls(call("c1")), calls(call("c2")), answer("c1"), answer("c2")),
        wanted(user("hi"), assistant(use("c1"), use("c2")), user(result("c1"), result("c2"))),
    ),
    case(
        "a call without result gets one that says so",
        chat(
            CHAT_HI,
            calls(call("c1"), call("c2")),
            answer("c2"),
            {"role": "user", "content": "stop"},
        ),
        wanted(
            user("hi"),
            assistant(use("c1"), use("c2")),
            user(no_result("c1"), result("c2"), "stop"),
        ),
    ),
    case(
        "calls at the very end get results, too",
        chat(CHAT_HI, calls(call("c1"))),
        wanted(user("hi"), assistant(use("c1")), user(no_result("c1"))),
    ),
    case(
        "a result without a call becomes text of the user",
        chat(CHAT_HI, answer("gone", "18C"), answer("gone2", [{"type": "text", "text": "21C"}])),
        wanted(user("hi", "18C", "21C")),
    ),
    case(
        "an empty result without a call leaves nothing, no empty message either",
        chat(CHAT_HI, {"role": "assistant", "content": "a"}, answer("gone", "")),
        wanted(user("hi"), assistant("a")),
    ),
    case(
        "a result that comes after the next answer is no result any more",
        chat(
            CHAT_HI,
            calls(call("c1")),
            answer("c1"),
            {"role": "assistant", "content": "a"},
            answer("c1", "late"),
        ),
        wanted(user("hi"), assistant(use("c1")), user(result("c1")), assistant("a"), user("late")),
    ),
    case(
        "of two results for one call the last counts (#35)",
        chat(CHAT_HI, calls(call("c1")), answer("c1", "old"), answer("c1", "new")),
        wanted(user("hi"), assistant(use("c1")), user(result("c1", "new"))),
    ),
    case(
        "a call both as content block and in tool_calls is one call (#22)",
        chat(
            CHAT_HI,
            calls(call("c1"), content=[{"type": "tool_use", "id": "c1", "name": "f", "input": {}}]),
            answer("c1"),
        ),
        wanted(user("hi"), assistant(use("c1")), user(result("c1"))),
    ),
    case(
        "an id that Anthropic refuses is changed in both places, distinct ones stay distinct",
        chat(CHAT_HI, calls(call("a.b"), call("a/b")), answer("a.b", "1"), answer("a/b", "2")),
        wanted(
            user("hi"),
            assistant(use("a_b_2e7336dc"), use("a_b_c14cddc0")),
            user(result("a_b_2e7336dc", "1"), result("a_b_c14cddc0", "2")),
        ),
    ),
    case(
        "a long result is not cut, an error stays an error (S4-B12)",
        chat(CHAT_HI, calls(call("c1")), answer("c1", "x" * 9000, is_error=True)),
        wanted(user("hi"), assistant(use("c1")), user(result("c1", "x" * 9000, is_error=True))),
    ),
    case(
        "an empty result has no content",
        chat(CHAT_HI, calls(call("c1"), call("c2")), answer("c1", " \n"), answer("c2", None)),
        wanted(
            user("hi"),
            assistant(use("c1"), use("c2")),
            user(
                {"type": "tool_result", "tool_use_id": "c1"},
                {"type": "tool_result", "tool_use_id": "c2"},
            ),
        ),
    ),
    case(
        "images and documents in a result stay in it (#5, S4-B12)",
        chat(
            CHAT_HI,
            calls(call("c1")),
            answer(
                "c1",
                [
                    {"type": "text", "text": "shot"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                    {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{PDF}"}},
                ],
            ),
        ),
        wanted(
            user("hi"),
            assistant(use("c1")),
            user(
                result(
                    "c1",
                    [
                        says("shot"),
                        image("image/png", PNG),
                        {
                            "type": "document",
                            "source": {
                                "type": "base64",
                                "media_type": "application/pdf",
                                "data": PDF,
                            },
                        },
                    ],
                )
            ),
        ),
    ),
    case(
        "Anthropic's own blocks pass (Cursor, #19)",
        chat(
            CHAT_HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "text", "text": "a"},
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "and"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "c1",
                        "content": [{"type": "text", "text": "18C"}],
                    },
                    image("image/png", PNG),
                ],
            },
        ),
        wanted(
            user("hi"),
            assistant({"type": "thinking", "thinking": "t", "signature": "s"}, "a", use("c1", a=1)),
            user(result("c1", [says("18C")]), "and", image("image/png", PNG)),
        ),
    ),
    case(
        "a custom call of the history carries its text in `input` (#27)",
        chat(
            CHAT_HI,
            calls({"id": "c1", "type": "custom", "custom": {"name": "p", "input": "*** Begin"}}),
            answer("c1", "ok"),
        ),
        wanted(user("hi"), assistant(use("c1", "p", input="*** Begin")), user(result("c1", "ok"))),
    ),
    case(
        "a flat call, in Responses' form, is a call",
        chat(
            CHAT_HI,
            calls({"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'}),
            answer("c1"),
        ),
        wanted(user("hi"), assistant(use("c1", a=1)), user(result("c1"))),
    ),
    case(
        "legacy function messages get ids on both sides",
        chat(
            CHAT_HI,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "f", "arguments": '{"a":1}'},
            },
            {"role": "function", "name": "f", "content": "18C"},
            {"role": "assistant", "content": "So", "function_call": {"name": "g", "arguments": ""}},
            {"role": "function", "name": "g", "content": None},
        ),
        wanted(
            user("hi"),
            assistant(use("call_fn_1", a=1)),
            user(result("call_fn_1")),
            assistant("So", use("call_fn_3", "g")),
            user({"type": "tool_result", "tool_use_id": "call_fn_3"}),
        ),
    ),
    case(
        "a legacy result answers the last call of its name",
        chat(
            CHAT_HI,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "fn.old", "arguments": ""},
            },
            {"role": "function", "name": "fn.old", "content": "1"},
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "fn.old", "arguments": ""},
            },
            {"role": "function", "name": "fn.old", "content": "2"},
        ),
        wanted(
            user("hi"),
            assistant(use("call_fn_1", "fn_old_9c5b44c6")),
            user(result("call_fn_1", "1")),
            assistant(use("call_fn_3", "fn_old_9c5b44c6")),
            user(result("call_fn_3", "2")),
        ),
    ),
    case(
        "a legacy result without a call becomes text",
        chat(CHAT_HI, {"role": "function", "name": "f", "content": "18C"}),
        wanted(user("hi", "18C")),
    ),
]


def test_results_of_functions_take_no_quadratic_time() -> None:
    asked = {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}
    given = [{"role": "function", "name": "g", "content": "18C"}] * 20_000
    body = chat(CHAT_HI, asked, *given)  # each once went through all that came before
    began = time.process_time()
    messages = shim.messages_request_from_chat(body, "m").finished()["messages"]
    assert time.process_time() - began < 5.0  # it once took 20
    assert [len(message["content"]) for message in messages] == [1, 1, 20_001]


THOUGHT: JSON = {"type": "thinking", "thinking": "Hm.", "signature": "sig"}
HIDDEN: JSON = {"type": "redacted_thinking", "data": "Emw"}

THINKING = [
    case(
        "signed thinking_blocks go before everything else of the turn (#6)",
        chat(
            CHAT_HI,
            {
                **calls(call("c1"), content="Checking."),
                "reasoning_content": "Hm.",
                "thinking_blocks": [{"index": 0, **THOUGHT}, {"index": 1, **HIDDEN}],
            },
            answer("c1"),
        ),
        wanted(user("hi"), assistant(THOUGHT, HIDDEN, "Checking.", use("c1")), user(result("c1"))),
    ),
    case(
        "thinking that was signed but not shown comes back empty",
        chat(
            CHAT_HI,
            {
                "role": "assistant",
                "content": "a",
                "thinking_blocks": [{"type": "thinking", "signature": "s"}],
            },
            CHAT_HI,
        ),
        wanted(
            user("hi"),
            assistant({"type": "thinking", "thinking": "", "signature": "s"}, "a"),
            user("hi"),
        ),
    ),
    case(
        "thinking without a signature cannot go back",
        chat(
            CHAT_HI,
            {
                "role": "assistant",
                "content": "a",
                "reasoning_content": "Hm.",
                "reasoning": "Hm.",
                "thinking_blocks": [
                    {"type": "thinking", "thinking": "Hm."},
                    "x",
                    {"type": "other"},
                ],
                "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}, None],
            },
            CHAT_HI,
        ),
        wanted(user("hi"), assistant("a"), user("hi")),
    ),
    case(
        "signed reasoning_details are thinking (OpenRouter's form)",
        chat(
            CHAT_HI,
            {
                "role": "assistant",
                "content": "a",
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "Hm.", "signature": "sig", "index": 0},
                    {"type": "reasoning.encrypted", "data": "Emw", "id": "r1"},
                    {"type": "reasoning.summary", "summary": "short"},
                ],
            },
            CHAT_HI,
        ),
        wanted(user("hi"), assistant(THOUGHT, HIDDEN, "a"), user("hi")),
    ),
    case(
        "the same thought in both carriers goes back once",
        chat(
            CHAT_HI,
            {
                "role": "assistant",
                "content": "a",
                "thinking_blocks": [THOUGHT],
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "Hm.", "signature": "sig"}
                ],
            },
            CHAT_HI,
        ),
        wanted(user("hi"), assistant(THOUGHT, "a"), user("hi")),
    ),
]

ARGUMENTS = [
    case("text of an object is parsed", '{"city": "Paris"}', {"city": "Paris"}),
    case("an object stays as it is", {"city": "Paris"}, {"city": "Paris"}),
    case("nothing is an empty object", "", {}),
    case("white space is an empty object", " \n", {}),
    case("null is an empty object", None, {}),
    case("the text null is an empty object", "null", {}),
    case("broken JSON is kept as it is (S4-B22)", '{"city": "Par', {"_raw": '{"city": "Par'}),
    case("NaN is no JSON", '{"a": NaN}', {"_raw": '{"a": NaN}'}),
    case("a list is wrapped", "[1, 2]", {"_raw": [1, 2]}),
    case("a number is wrapped", "0", {"_raw": 0}),
    case("a boolean is wrapped", "false", {"_raw": False}),
    case("a string in JSON is wrapped", '"Paris"', {"_raw": "Paris"}),
    case("a list that is no text is wrapped", [], {"_raw": []}),
    case("text nested too deeply is kept", "[" * 999 + "]" * 999, {"_raw": "[" * 999 + "]" * 999}),
]


@pytest.mark.parametrize(("body", "expected"), [*ROLES, *HISTORY, *THINKING])
def test_chat_conversation(body: JSON, expected: JSON) -> None:
    assert requested(body) == expected


@pytest.mark.parametrize(("arguments", "expected"), ARGUMENTS)
def test_chat_arguments_of_earlier_calls(arguments: Any, expected: JSON) -> None:
    body = chat(CHAT_HI, calls(call("c1", arguments)), answer("c1"))
    assert requested(body)["messages"][1]["content"][0]["input"] == expected


def test_chat_call_ids_used_again_in_a_later_turn_stay_unique() -> None:
    """Clients that number calls within a turn; Anthropic: `tool_use` ids must be unique (#22)."""
    body = chat(
        CHAT_HI,
        calls(call("call_0")),
        answer("call_0", "1"),
        calls(call("call_0")),
        answer("call_0", "2"),
    )
    turns = requested(body)["messages"]
    ids = [turns[1]["content"][0]["id"], turns[3]["content"][0]["id"]]
    results = [turns[2]["content"][0], turns[4]["content"][0]]
    assert ids[0] != ids[1]
    assert results == [result(ids[0], "1"), result(ids[1], "2")]


def test_chat_thinking_is_recalled_by_the_id_of_a_call() -> None:
    """For clients that do not send thinking back; what the client does send wins."""
    memory = {"c2": [THOUGHT], "c3": [HIDDEN]}
    body = chat(
        CHAT_HI,
        calls(call("c1"), call("c2")),
        answer("c1"),
        answer("c2"),
        {**calls(call("c3")), "thinking_blocks": [THOUGHT]},
        answer("c3"),
    )
    draft = shim.messages_request_from_chat(body, OPUS, lambda call_id: memory.get(call_id, []))
    assert draft.finished() == wanted(
        user("hi"),
        assistant(THOUGHT, use("c1"), use("c2")),
        user(result("c1"), result("c2")),
        assistant(THOUGHT, use("c3")),
        user(result("c3")),
    )


# --- (a) requests: content parts


def document(type: str, media_type: str, content: str, **more: Any) -> JSON:
    source = {"type": type, "media_type": media_type, "data": content}
    return {"type": "document", "source": source, **more}


PARTS = [
    case(
        "a data: URL is an image",
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "low"},
        },
        image("image/png", PNG),
    ),
    case(
        "the bytes tell the type when the URL is wrong",
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{JPEG}"}},
        image("image/jpeg", JPEG),
    ),
    case(
        "image/jpg is image/jpeg",
        {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,AAAA"}},
        image("image/jpeg", "AAAA"),
    ),
    case(
        "gif, after parameters of the URL",
        {"type": "image_url", "image_url": {"url": f"data:image/gif;charset=utf-8;base64,{GIF}"}},
        image("image/gif", GIF),
    ),
    case(
        "webp, without a type",
        {"type": "image_url", "image_url": {"url": f"data:;base64,{WEBP}"}},
        image("image/webp", WEBP),
    ),
    case(
        "a URL written in percent signs",
        {"type": "image_url", "image_url": {"url": "data:image/png,%89PNG%0D%0A%1A%0A"}},
        image("image/png", PNG),
    ),
    case(
        "a web address is handed on, never fetched",
        {"type": "image_url", "image_url": {"url": "https://w.example/a.png"}},
        {"type": "image", "source": {"type": "url", "url": "https://w.example/a.png"}},
    ),
    case(
        "a bare string instead of an object",
        {"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"},
        image("image/png", PNG),
    ),
    case(
        "input_image of Responses",
        {"type": "input_image", "image_url": "https://w.example/a.png"},
        {"type": "image", "source": {"type": "url", "url": "https://w.example/a.png"}},
    ),
    case(
        "a PDF by data: URL, with its name",
        {
            "type": "file",
            "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"},
        },
        document("base64", "application/pdf", PDF, title="a.pdf"),
    ),
    case(
        "a PDF in naked base64",
        {"type": "file", "file": {"file_data": PDF}},
        document("base64", "application/pdf", PDF),
    ),
    case(
        "a text file becomes a text document",
        {
            "type": "file",
            "file": {"filename": "a.txt", "file_data": "data:text/plain;base64,R3LDvMOfZQ=="},
        },
        document("text", "text/plain", "Gr\u00fc\u00dfe", title="a.txt"),
    ),
    case(
        "an image sent as a file is an image",
        {"type": "file", "file": {"filename": "a.bin", "file_data": PNG}},
        image("image/png", PNG),
    ),
    case(
        "input_file of Responses",
        {"type": "input_file", "filename": "a.pdf", "file_data": PDF},
        document("base64", "application/pdf", PDF, title="a.pdf"),
    ),
    case(
        "a file by address",
        {"type": "input_file", "file_url": "https://w.example/a.pdf"},
        {"type": "document", "source": {"type": "url", "url": "https://w.example/a.pdf"}},
    ),
    case(
        "a file that Anthropic keeps",
        {"type": "file", "file": {"file_id": "file_011"}},
        {"type": "document", "source": {"type": "file", "file_id": "file_011"}},
    ),
    case(
        "a document in Anthropic's form",
        {**document("text", "text/plain", "x"), "citations": {"enabled": True}},
        {**document("text", "text/plain", "x"), "citations": {"enabled": True}},
    ),
]


@pytest.mark.parametrize(("part", "expected"), PARTS)
def test_chat_part(part: JSON, expected: JSON) -> None:
    body = chat({"role": "user", "content": [{"type": "text", "text": "see"}, part]})
    assert requested(body) == wanted(user("see", expected))


NATIVE = [
    {"type": "search_result", "source": "s", "title": "t", "content": [says("x")]},
    {"type": "container_upload", "file_id": "file_011"},
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}},
    {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
    {"type": "web_fetch_tool_result", "tool_use_id": "s1", "content": {}},
    {"type": "redacted_thinking", "data": "Emw"},
]


@pytest.mark.parametrize("block", NATIVE, ids=lambda block: block["type"])
def test_chat_native_block_passes(block: JSON) -> None:
    body = chat(CHAT_HI, {"role": "assistant", "content": [block]}, CHAT_HI)
    assert requested(body) == wanted(user("hi"), assistant(block), user("hi"))


def test_chat_parts_inside_a_native_result_are_converted() -> None:
    inner = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    body = chat(CHAT_HI, calls(call("c1")), {"role": "user", "content": [result("c1", [inner])]})
    assert requested(body) == wanted(
        user("hi"), assistant(use("c1")), user(result("c1", [image("image/png", PNG)]))
    )


CITABLE: JSON = {**document("text", "text/plain", "x"), "citations": {"enabled": True}}
ANNOTATED = [
    case("plain text", chat(CHAT_HI), False),
    case("a document that may be cited", chat({"role": "user", "content": [CITABLE]}), True),
    case("one inside a result", chat(CHAT_HI, calls(call("c1")), answer("c1", [CITABLE])), True),
    case("a server tool", chat(CHAT_HI, tools=[{"type": "web_fetch_20250910", "name": "w"}]), True),
    case("the client's own tool", chat(CHAT_HI, tools=[function()]), False),
]


@pytest.mark.parametrize(("body", "expected"), ANNOTATED)
def test_chat_citations_may_come(body: JSON, expected: bool) -> None:
    """Then the offsets of an answer's text must be counted."""
    assert shim.messages_request_from_chat(body, OPUS).annotated is expected


CACHE_MARKS = [
    case(
        "on a part, and on a message for its last part (opencode)",
        chat(
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a", "cache_control": MARK},
                    {"type": "text", "text": "b"},
                ],
                "cache_control": {"type": "ephemeral", "ttl": "5m"},
            }
        ),
        wanted(
            user(
                says("a", cache_control=MARK),
                says("b", cache_control={"type": "ephemeral", "ttl": "5m"}),
            )
        ),
    ),
    case(
        "on messages whose content is a string",
        chat(
            {"role": "system", "content": "S", "cache_control": MARK},
            {"role": "user", "content": "hi", "cache_control": MARK},
            {"role": "assistant", "content": "a", "cache_control": MARK},
            CHAT_HI,
        ),
        wanted(
            user(says("hi", cache_control=MARK)),
            assistant(says("a", cache_control=MARK)),
            user("hi"),
            system=[says("S", cache_control=MARK)],
        ),
    ),
    case(
        "on a tool, a call and a tool message",
        chat(
            CHAT_HI,
            calls(call("c1", cache_control=MARK)),
            answer("c1", cache_control=MARK),
            tools=[{**function(), "cache_control": MARK}],
        ),
        wanted(
            user("hi"),
            assistant({**use("c1"), "cache_control": MARK}),
            user(result("c1", cache_control=MARK)),
            tools=[tool(cache_control=MARK)],
        ),
    ),
    case(
        "inside the function of a tool (LiteLLM)",
        chat(CHAT_HI, tools=[function(cache_control=MARK)]),
        wanted(user("hi"), tools=[tool(cache_control=MARK)]),
    ),
    case(
        "at the top",
        chat(CHAT_HI, cache_control=MARK),
        wanted(user("hi"), cache_control=MARK),
    ),
    case(
        "prompt_cache_breakpoint is a mark; twelve hours are at most one",
        chat(
            {
                "role": "user",
                "content": [
                    {
                        "type": "text",
                        "text": "a",
                        "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"},
                    },
                    {
                        "type": "image_url",
                        "image_url": f"data:image/png;base64,{PNG}",
                        "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"},
                    },
                ],
            }
        ),
        wanted(
            user(
                says("a", cache_control={"type": "ephemeral", "ttl": "1h"}),
                {**image("image/png", PNG), "cache_control": {"type": "ephemeral", "ttl": "5m"}},
            )
        ),
    ),
    case(
        "of more than four the first of the messages goes",
        chat(
            {"role": "system", "content": "S", "cache_control": MARK},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": letter, "cache_control": MARK} for letter in "abcd"
                ],
            },
        ),
        wanted(
            user(
                "a",
                says("b", cache_control=MARK),
                says("c", cache_control=MARK),
                says("d", cache_control=MARK),
            ),
            system=[says("S", cache_control=MARK)],
        ),
    ),
    case(
        "an hour after five minutes would be refused: all are five minutes",
        chat(
            {"role": "system", "content": "S", "cache_control": MARK},
            {"role": "user", "content": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ),
        wanted(user(says("a", cache_control=MARK)), system=[says("S", cache_control=MARK)]),
    ),
]


@pytest.mark.parametrize(("body", "expected"), CACHE_MARKS)
def test_chat_cache_marks(body: JSON, expected: JSON) -> None:
    assert requested(body) == expected


def test_chat_explicit_prompt_cache() -> None:
    body = chat(CHAT_HI, prompt_cache_options={"mode": "explicit"})
    assert shim.messages_request_from_chat(body, OPUS).explicit_cache is True
    body = chat(CHAT_HI, prompt_cache_options={"mode": "implicit", "ttl": "30m"})
    assert shim.messages_request_from_chat(body, OPUS).explicit_cache is False
    assert shim.messages_request_from_chat(chat(CHAT_HI), OPUS).explicit_cache is False


# --- (a) requests: tools

CITY: JSON = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
GRAMMAR = "start: /.+/"

TOOLS = [
    case(
        "three dialects of tools in one body, and Anthropic's server tools (#19 #20 #21, S4-B11)",
        {
            "tools": [
                function("nested", description="N", parameters=CITY),
                {"type": "function", "name": "flat", "description": "F", "parameters": CITY},
                {"name": "native", "description": "A", "input_schema": CITY},
                {"type": "custom", "name": "typed", "input_schema": CITY},
                {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
            ]
        },
        {
            "tools": [
                {"name": "nested", "description": "N", "input_schema": CITY},
                {"name": "flat", "description": "F", "input_schema": CITY},
                {"name": "native", "description": "A", "input_schema": CITY},
                {"name": "typed", "input_schema": CITY},
                {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
            ]
        },
    ),
    case(
        "tools without parameters get an empty object (#39)",
        {
            "tools": [
                function("absent"),
                function("null", parameters=None),
                function("empty", parameters={}),
                function("untyped", parameters={"properties": {}}),
            ]
        },
        {"tools": [tool("absent"), tool("null"), tool("empty"), tool("untyped")]},
    ),
    case(
        "parameters may be text",
        {"tools": [function(parameters=json.dumps(CITY))]},
        {"tools": [{"name": "f", "input_schema": CITY}]},
    ),
    case(
        "a schema of draft 7 becomes one of 2020-12 (#13)",
        {
            "tools": [
                function(
                    parameters={
                        "$schema": "http://json-schema.org/draft-07/schema#",
                        "type": "object",
                        "properties": {
                            "a": {"$ref": "#/definitions/A"},
                            "b": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
                        },
                        "definitions": {"A": {"type": "string"}},
                    }
                )
            ]
        },
        {
            "tools": [
                {
                    "name": "f",
                    "input_schema": {
                        "type": "object",
                        "properties": {
                            "a": {"$ref": "#/$defs/A"},
                            "b": {"type": "number", "exclusiveMinimum": 0},
                        },
                        "$defs": {"A": {"type": "string"}},
                    },
                }
            ]
        },
    ),
    case(
        "a property named definitions keeps its name",
        {
            "tools": [
                function(
                    parameters={
                        "type": "object",
                        "properties": {"definitions": {"type": "string"}},
                        "required": ["definitions"],
                    }
                )
            ]
        },
        {
            "tools": [
                {
                    "name": "f",
                    "input_schema": {
                        "type": "object",
                        "properties": {"definitions": {"type": "string"}},
                        "required": ["definitions"],
                    },
                }
            ]
        },
    ),
    case(
        "a union at the root is merged (#12)",
        {
            "tools": [
                function(
                    parameters={
                        "anyOf": [
                            {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]},
                            {"properties": {"a": {}, "c": {}}, "required": ["a", "c"]},
                        ]
                    }
                )
            ]
        },
        {
            "tools": [
                {
                    "name": "f",
                    "input_schema": {
                        "type": "object",
                        "properties": {"a": {}, "b": {}, "c": {}},
                        "required": ["a"],
                    },
                }
            ]
        },
    ),
    case(
        "a strict tool keeps to what constrained output takes",
        {
            "tools": [
                function(
                    strict=True,
                    parameters={
                        "type": "object",
                        "properties": {"a": {"type": "string", "maxLength": 3}},
                        "required": ["a"],
                    },
                )
            ]
        },
        {
            "tools": [
                {
                    "name": "f",
                    "strict": True,
                    "input_schema": {
                        "type": "object",
                        "properties": {"a": {"type": "string", "description": "(maxLength: 3)"}},
                        "required": ["a"],
                        "additionalProperties": False,
                    },
                }
            ]
        },
    ),
    case(
        "of two tools with one name the last counts",
        {
            "tools": [
                function("f", description="old"),
                function("g"),
                function("f", description="new"),
            ]
        },
        {"tools": [tool("g"), tool("f", description="new")]},
    ),
    case(
        "custom tools, nested and flat: one string, the grammar in the description (#27)",
        {
            "tools": [
                {
                    "type": "custom",
                    "custom": {
                        "name": "p",
                        "description": "Patch.",
                        "format": {
                            "type": "grammar",
                            "grammar": {"definition": GRAMMAR, "syntax": "lark"},
                        },
                    },
                },
                {
                    "type": "custom",
                    "name": "q",
                    "format": {"type": "grammar", "definition": GRAMMAR, "syntax": "regex"},
                },
                {"type": "custom", "name": "r", "description": "R", "format": {"type": "text"}},
            ]
        },
        {
            "tools": [
                {
                    "name": "p",
                    "description": "Patch.\n\nThe input must fit this lark grammar:\nstart: /.+/",
                    "input_schema": {
                        "type": "object",
                        "properties": {"input": {"type": "string"}},
                        "required": ["input"],
                    },
                },
                {
                    "name": "q",
                    "description": "The input must fit this regex grammar:\nstart: /.+/",
                    "input_schema": {
                        "type": "object",
                        "properties": {"input": {"type": "string"}},
                        "required": ["input"],
                    },
                },
                {
                    "name": "r",
                    "description": "R",
                    "input_schema": {
                        "type": "object",
                        "properties": {"input": {"type": "string"}},
                        "required": ["input"],
                    },
                },
            ]
        },
    ),
    case("no tools are no tools, and no choice", {"tools": [], "tool_choice": "auto"}, {}),
    case("a choice without tools is nothing", {"tool_choice": "required"}, {}),
    case(
        "legacy functions; the old answer has room for one call",
        {"functions": [{"name": "f", "description": "F", "parameters": CITY}]},
        {
            "tools": [{"name": "f", "description": "F", "input_schema": CITY}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
    ),
    case(
        "legacy function_call none",
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"tools": [tool()], "tool_choice": {"type": "none"}},
    ),
    case(
        "legacy function_call auto",
        {"functions": [{"name": "f"}], "function_call": "auto"},
        {
            "tools": [tool()],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
    ),
    case(
        "legacy function_call by name",
        {"functions": [{"name": "f"}], "function_call": {"name": "f"}},
        {
            "tools": [tool()],
            "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        },
    ),
    case(
        "web_search_options is the search tool at the user's place",
        {
            "web_search_options": {
                "search_context_size": "medium",
                "user_location": {
                    "type": "approximate",
                    "approximate": {"city": "Bern", "country": "CH", "other": "x"},
                },
            }
        },
        {
            "tools": [
                {
                    "type": "web_search_20250305",
                    "name": "web_search",
                    "user_location": {"type": "approximate", "city": "Bern", "country": "CH"},
                }
            ]
        },
    ),
    case(
        "web_search_options without a place",
        {"web_search_options": {}},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), TOOLS)
def test_chat_tools(fields: JSON, expected: JSON) -> None:
    assert requested(chat(CHAT_HI, **fields)) == wanted(user("hi"), **expected)


CHOICES = [
    case("none", "none", {"type": "none"}),
    case("auto", "auto", {"type": "auto"}),
    case("required", "required", {"type": "any"}),
    case("any, in old LangChain", "any", {"type": "any"}),
    case(
        "a function, nested",
        {"type": "function", "function": {"name": "f"}},
        {"type": "tool", "name": "f"},
    ),
    case("a function, flat", {"type": "function", "name": "f"}, {"type": "tool", "name": "f"}),
    case(
        "a custom tool, nested",
        {"type": "custom", "custom": {"name": "f"}},
        {"type": "tool", "name": "f"},
    ),
    case("Anthropic's auto", {"type": "auto"}, {"type": "auto"}),
    case("Anthropic's any", {"type": "any"}, {"type": "any"}),
    case("Anthropic's none", {"type": "none"}, {"type": "none"}),
    case("Anthropic's tool", {"type": "tool", "name": "f"}, {"type": "tool", "name": "f"}),
    case(
        "Anthropic's mark against parallel calls",
        {"type": "auto", "disable_parallel_tool_use": True},
        {"type": "auto", "disable_parallel_tool_use": True},
    ),
    case(
        "Anthropic's mark beside one tool",
        {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    ),
    case(
        "a name that had to change",
        {"type": "function", "function": {"name": "mcp.server/tool"}},
        {"type": "tool", "name": "mcp_server_tool_9ab4336b"},
    ),
]


@pytest.mark.parametrize(("choice", "expected"), CHOICES)
def test_chat_tool_choice(choice: Any, expected: JSON) -> None:
    request = requested(
        chat(CHAT_HI, tools=[function(), function("mcp.server/tool")], tool_choice=choice)
    )
    assert request == wanted(
        user("hi"), tools=[tool(), tool("mcp_server_tool_9ab4336b")], tool_choice=expected
    )


ALLOWED = [
    case(
        "auto among some tools",
        {"mode": "auto", "tools": [function("a"), {"type": "function", "name": "c"}]},
        {"type": "auto"},
    ),
    case(
        "one of some tools is required",
        {"mode": "required", "tools": [{"name": "a"}, {"type": "custom", "custom": {"name": "c"}}]},
        {"type": "any"},
    ),
]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("allowed", "expected"), ALLOWED)
def test_chat_allowed_tools(allowed: JSON, flat: bool, expected: JSON) -> None:
    inner = allowed if flat else {"allowed_tools": allowed}
    body = chat(
        CHAT_HI,
        tools=[function("a"), function("b"), function("c")],
        tool_choice={"type": "allowed_tools", **inner},
    )
    assert requested(body) == wanted(user("hi"), tools=[tool("a"), tool("c")], tool_choice=expected)


PARALLEL = [
    case(
        "false alone",
        {"parallel_tool_calls": False},
        {"type": "auto", "disable_parallel_tool_use": True},
    ),
    case("true says nothing", {"parallel_tool_calls": True}, None),
    case(
        "false beside a choice",
        {"parallel_tool_calls": False, "tool_choice": "required"},
        {"type": "any", "disable_parallel_tool_use": True},
    ),
    case(
        "false beside none, which has no such mark",
        {"parallel_tool_calls": False, "tool_choice": "none"},
        {"type": "none"},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), PARALLEL)
def test_chat_parallel_tool_calls(fields: JSON, expected: Optional[JSON]) -> None:
    request = requested(chat(CHAT_HI, tools=[function()], **fields))
    assert request.get("tool_choice") == expected


def test_chat_names_are_made_acceptable_and_found_again() -> None:
    """Anthropic takes [a-zA-Z0-9_-]{1,128} (#11); the answer carries the client's own names."""
    names = ["mcp.server/tool", "a.b", "a/b", "n" * 150, "plain-1_x"]
    body = chat(
        CHAT_HI,
        calls(call("c1", name="a.b")),
        answer("c1"),
        tools=[function(name) for name in names],
    )
    draft = shim.messages_request_from_chat(body, OPUS)
    request = draft.finished()
    assert [t["name"] for t in request["tools"]] == [
        "mcp_server_tool_9ab4336b",
        "a_b_2e7336dc",
        "a_b_c14cddc0",
        "n" * 119 + "_11c3e5de",
        "plain-1_x",
    ]
    assert request["messages"][1] == assistant(use("c1", "a_b_2e7336dc"))
    message = chat_message_of(
        use("t1", "a_b_c14cddc0", x=1), use("t2", "plain-1_x"), stop_reason="tool_use"
    )
    completion = shim.chat_from_messages([message], shim.ChatReply.to(draft, 7))
    assert completion["choices"][0]["message"]["tool_calls"] == [
        call("t1", '{"x":1}', "a/b"),
        call("t2", "{}", "plain-1_x"),
    ]


# --- (a) requests: the other fields

PERSON: JSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "description": "in years"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "pet": {"oneOf": [{"$ref": "#/$defs/Pet"}, {"type": "null"}]},
    },
    "required": ["age"],
    "$defs": {"Pet": {"type": "object", "properties": {"name": {"type": "string"}}}},
}
PERSON_TAKEN: JSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "description": "in years (minimum: 0)"},
        "tags": {"type": "array", "items": {"type": "string"}, "description": "(minItems: 2)"},
        "pet": {"anyOf": [{"$ref": "#/$defs/Pet"}, {"type": "null"}]},
    },
    "required": ["age"],
    "additionalProperties": False,
    "$defs": {
        "Pet": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "additionalProperties": False,
        }
    },
}
SHOWN: JSON = {"type": "adaptive", "display": "summarized"}


def schema_format(schema: JSON, **more: Any) -> JSON:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def constrained(schema: JSON) -> JSON:
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


FIELDS = [
    case("max_tokens (S4-B7)", {"max_tokens": 100}, {"max_tokens": 100}),
    case("a whole number as JavaScript may write it", {"max_tokens": 100.0}, {"max_tokens": 100}),
    case(
        "max_completion_tokens wins over max_tokens",
        {"max_tokens": 100, "max_completion_tokens": 200},
        {"max_tokens": 200},
    ),
    case("temperature (S4-B7)", {"temperature": 0}, {"temperature": 0}),
    case("temperature over 1 is 1", {"temperature": 1.7}, {"temperature": 1}),
    case("top_p (S4-B7)", {"top_p": 0.5}, {"top_p": 0.5}),
    case("top_p of 1 says nothing", {"top_p": 1}, {}),
    case("top_k (S4-B7)", {"top_k": 5}, {"top_k": 5}),
    case("stop as a string (S4-B7)", {"stop": "END"}, {"stop_sequences": ["END"]}),
    case(
        "stop as a list, more than four, without blank ones",
        {"stop": ["a", "", "b", "\n", "c", "d", "e"]},
        {"stop_sequences": ["a", "b", "c", "d", "e"]},
    ),
    case("only blank stops", {"stop": ["\n\n"]}, {}),
    case("user", {"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
    case("a long user", {"user": "u" * 256}, {"metadata": {"user_id": "u" * 256}}),
    case("as many choices as there may be", {"n": 16}, {}),
    case(
        "an e-mail address is hashed",
        {"user": "jane@example.com"},
        {
            "metadata": {
                "user_id": "8c87b489ce35cf2e2f39f80e282cb2e804932a56a213983eeeb428407d43b52d"
            }
        },
    ),
    case(
        "a very long user is hashed",
        {"user": "u" * 300},
        {
            "metadata": {
                "user_id": "8b5089b44d9fefeafc563a34f6cb19fbdbe3814023622cb463bb4a74caba1c19"
            }
        },
    ),
    case(
        "safety_identifier wins over user",
        {"user": "u-1", "safety_identifier": "s-1"},
        {"metadata": {"user_id": "s-1"}},
    ),
    case("response_format text is nothing", {"response_format": {"type": "text"}}, {}),
    case(
        "response_format json_object is an instruction",
        {"response_format": {"type": "json_object"}},
        {
            "system": [
                says("Answer with one JSON object and nothing else: no other text, no code fence.")
            ]
        },
    ),
    case(
        "a JSON schema is made acceptable, what goes stays as a hint (#10)",
        {"response_format": schema_format(PERSON, strict=True)},
        constrained(PERSON_TAKEN),
    ),
    case(
        "a JSON schema without strict is one, too",
        {"response_format": schema_format(CITY)},
        constrained({**CITY, "additionalProperties": False}),
    ),
    case(
        "an object that may be null still may",
        {
            "response_format": schema_format(
                {
                    "type": "object",
                    "properties": {"a": {"type": ["object", "null"], "properties": {}}},
                }
            )
        },
        constrained(
            {
                "type": "object",
                "properties": {
                    "a": {
                        "type": ["object", "null"],
                        "properties": {},
                        "additionalProperties": False,
                    }
                },
                "additionalProperties": False,
            }
        ),
    ),
    case(
        "reasoning_effort",
        {"reasoning_effort": "medium"},
        {"output_config": {"effort": "medium"}, "thinking": SHOWN},
    ),
    case(
        "reasoning_effort minimal is low",
        {"reasoning_effort": "minimal"},
        {"output_config": {"effort": "low"}, "thinking": SHOWN},
    ),
    case(
        "reasoning_effort xhigh",
        {"reasoning_effort": "xhigh"},
        {"output_config": {"effort": "xhigh"}, "thinking": SHOWN},
    ),
    case("reasoning_effort none", {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}),
    case("an unknown reasoning_effort thinks", {"reasoning_effort": "ultra"}, {"thinking": SHOWN}),
    case(
        "reasoning.effort (OpenRouter)",
        {"reasoning": {"effort": "high"}},
        {"output_config": {"effort": "high"}, "thinking": SHOWN},
    ),
    case(
        "reasoning.max_tokens is a budget",
        {"reasoning": {"max_tokens": 4000}},
        {"thinking": {"type": "enabled", "budget_tokens": 4000}},
    ),
    case(
        "a budget is at least 1,024",
        {"reasoning": {"max_tokens": 10}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ),
    case("reasoning.enabled", {"reasoning": {"enabled": True}}, {"thinking": SHOWN}),
    case(
        "reasoning that is not enabled",
        {"reasoning": {"enabled": False}},
        {"thinking": {"type": "disabled"}},
    ),
    case(
        "reasoning.exclude thinks and does not show it",
        {"reasoning": {"effort": "high", "exclude": True}},
        {
            "output_config": {"effort": "high"},
            "thinking": {"type": "adaptive", "display": "omitted"},
        },
    ),
    case("empty reasoning is nothing", {"reasoning": {}}, {}),
    case(
        "thinking as Anthropic has it (S4-R16)",
        {"thinking": {"type": "enabled", "budget_tokens": 2048}},
        {"thinking": {"type": "enabled", "budget_tokens": 2048}},
    ),
    case(
        "thinking wins over reasoning_effort, whose effort stays",
        {"thinking": {"type": "adaptive"}, "reasoning_effort": "low"},
        {"output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}},
    ),
    case(
        "output_config beside a schema",
        {"output_config": {"effort": "low"}, "response_format": schema_format(CITY)},
        {
            "output_config": {
                "effort": "low",
                "format": {
                    "type": "json_schema",
                    "schema": {**CITY, "additionalProperties": False},
                },
            }
        },
    ),
    case(
        "Anthropic's own fields pass",
        {
            "container": "container_1",
            "context_management": {"edits": []},
            "mcp_servers": [{"type": "url", "url": "https://m.example", "name": "m"}],
        },
        {
            "container": "container_1",
            "context_management": {"edits": []},
            "mcp_servers": [{"type": "url", "url": "https://m.example", "name": "m"}],
        },
    ),
    case(
        "null is absent, for every field",
        dict.fromkeys(
            "max_tokens max_completion_tokens temperature top_p top_k stop n tools tool_choice "
            "functions function_call parallel_tool_calls response_format reasoning_effort "
            "reasoning thinking user safety_identifier stream stream_options web_search_options "
            "modalities output_config prompt_cache_options cache_control container "
            "context_management mcp_servers betas anthropic_beta input seed metadata audio "
            "logit_bias store".split()
        ),
        {},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_chat_fields(fields: JSON, expected: JSON) -> None:
    assert requested(chat(CHAT_HI, **fields)) == wanted(user("hi"), **expected)


def test_chat_betas_become_a_header() -> None:
    body = chat(CHAT_HI, betas=["a-1", " b_2 "], anthropic_beta="c.3,d")
    assert shim.messages_request_from_chat(body, OPUS).betas == ["a-1", "b_2", "c.3", "d"]


def test_chat_what_the_answer_must_know() -> None:
    plain = shim.ChatReply.to(shim.messages_request_from_chat(chat(CHAT_HI), OPUS), 7)
    assert plain == shim.ChatReply(7, {}, frozenset(), False, False, False, False, False)
    body = chat(
        CHAT_HI,
        n=3,
        stream_options={"include_usage": True, "include_obfuscation": False},
        functions=[{"name": "fn.old"}],
        tools=[{"type": "custom", "name": "apply.patch"}],
        response_format={"type": "json_object"},
        web_search_options={},
    )
    draft = shim.messages_request_from_chat(body, OPUS)
    assert draft.n == 3
    assert shim.ChatReply.to(draft, 7) == shim.ChatReply(
        created=7,
        names={"fn_old_9c5b44c6": "fn.old", "apply_patch_43d978a7": "apply.patch"},
        custom_tools=frozenset({"apply.patch"}),
        legacy=True,
        json_object=True,
        include_usage=True,
        annotated=True,
    )
    body = chat(CHAT_HI, response_format=schema_format(CITY))
    reply = shim.ChatReply.to(shim.messages_request_from_chat(body, OPUS), 7)
    assert reply == shim.ChatReply(created=7, json_schema=True)


ADAPTED = [
    case(
        "sampling goes where it is refused, max_tokens comes (#18)",
        OPUS,
        chat(CHAT_HI, temperature=0, top_p=0.5),
        wanted(user("hi"), max_tokens=128000),
        ("temperature", "top_p"),
    ),
    case(
        "an older model takes one of both",
        "claude-haiku-4-5",
        chat(CHAT_HI, temperature=0, top_p=0.5),
        {**wanted(user("hi"), max_tokens=64000, temperature=0), "model": "claude-haiku-4-5"},
        ("top_p",),
    ),
    case(
        "a limit over the model's is the model's",
        "claude-haiku-4-5",
        chat(CHAT_HI, max_tokens=100000),
        {**wanted(user("hi"), max_tokens=64000), "model": "claude-haiku-4-5"},
        ("max_tokens",),
    ),
    case(
        "a forced choice becomes words where it is refused (#14)",
        OPUS,
        chat(
            CHAT_HI, tools=[function()], tool_choice={"type": "function", "function": {"name": "f"}}
        ),
        wanted(
            user("hi"),
            {"role": "system", "content": [says("Answer this turn by calling the tool f.")]},
            tools=[tool()],
            tool_choice={"type": "auto"},
            max_tokens=128000,
        ),
        ("tool_choice",),
    ),
    case(
        "a forced choice stays elsewhere, without a thinking budget",
        "claude-haiku-4-5",
        chat(CHAT_HI, tools=[function()], tool_choice="required", reasoning_effort="low"),
        {
            **wanted(user("hi"), tools=[tool()], tool_choice={"type": "any"}, max_tokens=64000),
            "model": "claude-haiku-4-5",
        },
        (),
    ),
    case(
        "effort is a budget for older models",
        "claude-haiku-4-5",
        chat(CHAT_HI, reasoning_effort="low", thinking={"type": "adaptive"}),
        {
            **wanted(
                user("hi"),
                max_tokens=64000,
                thinking={"type": "enabled", "budget_tokens": 2048},
            ),
            "model": "claude-haiku-4-5",
        },
        (),
    ),
    case(
        "no reasoning is low effort where thinking cannot be off",
        OPUS,
        chat(CHAT_HI, reasoning_effort="none"),
        wanted(user("hi"), max_tokens=128000, output_config={"effort": "low"}),
        (),
    ),
    case(
        "a trailing assistant message gets a nudge (#26)",
        OPUS,
        chat(CHAT_HI, {"role": "assistant", "content": "I am "}),
        wanted(user("hi"), assistant("I am "), user("Continue."), max_tokens=128000),
        (),
    ),
    case(
        "or is continued, without white space at its end",
        "claude-haiku-4-5",
        chat(CHAT_HI, {"role": "assistant", "content": "I am "}),
        {**wanted(user("hi"), assistant("I am"), max_tokens=64000), "model": "claude-haiku-4-5"},
        (),
    ),
    case(
        "a system message in the middle becomes a reminder where it is refused (#16)",
        "claude-sonnet-5",
        chat(
            CHAT_HI,
            {"role": "system", "content": "S"},
            {"role": "assistant", "content": "a"},
            CHAT_HI,
        ),
        {
            **wanted(
                user("hi", "<system-reminder>\nS\n</system-reminder>"),
                assistant("a"),
                user("hi"),
                max_tokens=128000,
            ),
            "model": "claude-sonnet-5",
        },
        (),
    ),
]


@pytest.mark.parametrize(("model", "body", "expected", "changed"), ADAPTED)
def test_chat_request_as_the_model_takes_it(
    model: str, body: JSON, expected: JSON, changed: Tuple[str, ...]
) -> None:
    request = shim.messages_request_from_chat(body, model).finished()
    assert shim.adapted(request, shim.known_model(model)) == (expected, changed)


# --- (b) refusals


def parts(*content: Any) -> JSON:
    return chat({"role": "user", "content": list(content)})


def tools_body(*tools: Any, **fields: Any) -> JSON:
    return chat(CHAT_HI, tools=list(tools), **fields)


REFUSED = [
    case("no messages", {}, "messages"),
    case("messages null", {"messages": None}, "messages"),
    case("messages empty", {"messages": []}, "messages"),
    case("messages a string", {"messages": "hi"}, "messages"),
    case("messages an object", {"messages": {}}, "messages"),
    case("only blank messages", chat({"role": "user", "content": " "}), "messages"),
    case("only a system message", chat({"role": "system", "content": "S"}), "messages"),
    case("a message that is a number", {"messages": [CHAT_HI, 5]}, "messages.1"),
    case("a message that is null", {"messages": [None]}, "messages.0"),
    case("no role", chat({"content": "x"}), "messages.0.role"),
    case("an unknown role", chat(CHAT_HI, {"role": "robot", "content": "x"}), "messages.1.role"),
    case("a role that is a list", chat({"role": ["user"], "content": "x"}), "messages.0.role"),
    case("content a number", chat({"role": "user", "content": 5}), "messages.0.content"),
    case("content an object", chat({"role": "user", "content": {}}), "messages.0.content"),
    case("a part that is a number", parts({"text": "a"}, 5), "messages.0.content.1"),
    case("an unknown part", parts({"type": "smell"}), "messages.0.content.0.type"),
    case("a part type that is a list", parts({"type": []}), "messages.0.content.0.type"),
    case("text null", parts({"type": "text", "text": None}), "messages.0.content.0.text"),
    case("text a list", parts({"type": "text", "text": []}), "messages.0.content.0.text"),
    case(
        "refusal a number",
        chat(CHAT_HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": 1}]}),
        "messages.1.content.0.refusal",
    ),
    case(
        "an image without URL",
        parts({"type": "image_url", "image_url": {}}),
        "messages.0.content.0.image_url.url",
    ),
    case(
        "an image of a kind that Claude does not read",
        parts({"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,PHN2Zy8+"}}),
        "messages.0.content.0.image_url.url",
    ),
    case(
        "an image by file: URL",
        parts({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        "messages.0.content.0.image_url.url",
    ),
    case(
        "a data: URL without comma",
        parts({"type": "image_url", "image_url": {"url": "data:image/png"}}),
        "messages.0.content.0.image_url.url",
    ),
    case(
        "audio",
        parts({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        "messages.0.content.0",
    ),
    case("video", parts({"type": "video_url", "video_url": {"url": "x"}}), "messages.0.content.0"),
    case(
        "a zip file",
        parts({"type": "file", "file": {"file_data": "data:application/zip;base64,UEsDBP/+"}}),
        "messages.0.content.0.file.file_data",
    ),
    case(
        "a file without content",
        parts({"type": "file", "file": {"filename": "a.pdf"}}),
        "messages.0.content.0.file.file_data",
    ),
    case(
        "a file that OpenAI keeps",
        parts({"type": "file", "file": {"file_id": "file-abc"}}),
        "messages.0.content.0.file.file_id",
    ),
    case(
        "a file id that is a number",
        parts({"type": "file", "file": {"file_id": 5}}),
        "messages.0.content.0.file.file_id",
    ),
    case(
        "an image in a system message",
        chat(
            {
                "role": "system",
                "content": [
                    {"type": "text", "text": " "},
                    {"type": "image_url", "image_url": {"url": "https://w.example/a.png"}},
                ],
            },
            CHAT_HI,
        ),
        "messages.0.content.1",
    ),
    case(
        "a result without call id (S4-B22)",
        chat(CHAT_HI, {"role": "tool", "content": "x"}),
        "messages.1.tool_call_id",
    ),
    case("a result that is a number", chat(CHAT_HI, answer("c1", 5)), "messages.1.content"),
    case(
        "a bad part of a result",
        chat(CHAT_HI, answer("c1", [{"type": "smell"}])),
        "messages.1.content.0.type",
    ),
    case(
        "tool_calls an object",
        chat({"role": "assistant", "tool_calls": {}}),
        "messages.0.tool_calls",
    ),
    case("a call that is a string", chat(calls("x")), "messages.0.tool_calls.0"),
    case(
        "a call whose function is a number",
        chat(calls({"id": "c", "function": 5})),
        "messages.0.tool_calls.0.function",
    ),
    case(
        "a call without name",
        chat(calls({"id": "c", "function": {"arguments": ""}})),
        "messages.0.tool_calls.0.function.name",
    ),
    case(
        "a call without id",
        chat(calls(call("c0"), {"function": {"name": "f"}})),
        "messages.0.tool_calls.1.id",
    ),
    case(
        "a legacy call that is a string",
        chat({"role": "assistant", "function_call": "f"}),
        "messages.0.function_call",
    ),
    case(
        "a legacy call without name",
        chat({"role": "assistant", "function_call": {"arguments": ""}}),
        "messages.0.function_call.name",
    ),
    case(
        "a legacy result without name",
        chat(CHAT_HI, {"role": "function", "content": ""}),
        "messages.1.name",
    ),
    case("input a number", {"input": 5}, "input"),
    case("an item that is a number", {"input": [5]}, "input.0"),
    case("an item of an unknown role", {"input": [{"role": "robot"}]}, "input.0.role"),
    case("tools an object", chat(CHAT_HI, tools={}), "tools"),
    case("a tool that is a string", tools_body(function(), "f"), "tools.1"),
    case(
        "a tool without name",
        tools_body({"type": "function", "function": {}}),
        "tools.0.function.name",
    ),
    case(
        "parameters that are a number",
        tools_body(function(parameters=5)),
        "tools.0.function.parameters",
    ),
    case(
        "parameters of a flat tool that are a number",
        tools_body({"type": "function", "name": "f", "parameters": 5}),
        "tools.0.parameters",
    ),
    case(
        "a root union that is no list",
        tools_body(function(parameters={"anyOf": {}})),
        "tools.0.function.parameters.anyOf",
    ),
    case("functions a string", chat(CHAT_HI, functions="f"), "functions"),
    case("a function that is a string", chat(CHAT_HI, functions=["f"]), "functions.0"),
    case("a function without name", chat(CHAT_HI, functions=[{}]), "functions.0.name"),
    case(
        "parameters of a function that are a number",
        chat(CHAT_HI, functions=[{"name": "f", "parameters": 5}]),
        "functions.0.parameters",
    ),
    case("a choice that is a number", tools_body(function(), tool_choice=5), "tool_choice"),
    case("an unknown choice", tools_body(function(), tool_choice="maybe"), "tool_choice"),
    case(
        "a choice without name",
        tools_body(function(), tool_choice={"type": "function", "function": {}}),
        "tool_choice.function.name",
    ),
    case(
        "allowed tools that are not given",
        tools_body(
            function(),
            tool_choice={"type": "allowed_tools", "allowed_tools": {"tools": [function("g")]}},
        ),
        "tool_choice.allowed_tools.tools",
    ),
    case(
        "a legacy choice without name",
        chat(CHAT_HI, functions=[{"name": "f"}], function_call={"name": 5}),
        "function_call.name",
    ),
    case(
        "parallel_tool_calls a string",
        tools_body(function(), parallel_tool_calls="no"),
        "parallel_tool_calls",
    ),
    case("max_tokens 0", chat(CHAT_HI, max_tokens=0), "max_tokens"),
    case("max_tokens negative", chat(CHAT_HI, max_tokens=-1), "max_tokens"),
    case("max_tokens a string", chat(CHAT_HI, max_tokens="5"), "max_tokens"),
    case("max_tokens a fraction", chat(CHAT_HI, max_tokens=1.5), "max_tokens"),
    case("max_tokens true", chat(CHAT_HI, max_tokens=True), "max_tokens"),
    case(
        "max_completion_tokens 0", chat(CHAT_HI, max_completion_tokens=0), "max_completion_tokens"
    ),
    case("temperature a string", chat(CHAT_HI, temperature="hot"), "temperature"),
    case("temperature true", chat(CHAT_HI, temperature=True), "temperature"),
    case("top_p a list", chat(CHAT_HI, top_p=[]), "top_p"),
    case("top_k a string", chat(CHAT_HI, top_k="x"), "top_k"),
    case("stop a number", chat(CHAT_HI, stop=5), "stop"),
    case("a stop that is a number", chat(CHAT_HI, stop=["a", 5]), "stop.1"),
    case("n 0", chat(CHAT_HI, n=0), "n"),
    case("n negative", chat(CHAT_HI, n=-1), "n"),
    case("n a string", chat(CHAT_HI, n="2"), "n"),
    case("n over the limit", chat(CHAT_HI, n=17), "n"),
    case("stream_options a boolean", chat(CHAT_HI, stream_options=True), "stream_options"),
    case("response_format a string", chat(CHAT_HI, response_format="json"), "response_format"),
    case(
        "an unknown response_format",
        chat(CHAT_HI, response_format={"type": "xml"}),
        "response_format.type",
    ),
    case(
        "a schema format without schema",
        chat(CHAT_HI, response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
        "response_format.json_schema.schema",
    ),
    case(
        "a schema format that is a list",
        chat(CHAT_HI, response_format={"type": "json_schema", "json_schema": []}),
        "response_format.json_schema",
    ),
    case("reasoning_effort a number", chat(CHAT_HI, reasoning_effort=5), "reasoning_effort"),
    case("reasoning a string", chat(CHAT_HI, reasoning="high"), "reasoning"),
    case("reasoning.effort a number", chat(CHAT_HI, reasoning={"effort": 5}), "reasoning.effort"),
    case(
        "reasoning.max_tokens 0", chat(CHAT_HI, reasoning={"max_tokens": 0}), "reasoning.max_tokens"
    ),
    case("thinking a boolean", chat(CHAT_HI, thinking=True), "thinking"),
    case(
        "thinking.budget_tokens a string",
        chat(CHAT_HI, thinking={"type": "enabled", "budget_tokens": "x"}),
        "thinking.budget_tokens",
    ),
    case("thinking.type a list", chat(CHAT_HI, thinking={"type": []}), "thinking.type"),
    case("user a number", chat(CHAT_HI, user=5), "user"),
    case("safety_identifier a number", chat(CHAT_HI, safety_identifier=5), "safety_identifier"),
    case(
        "web_search_options a boolean", chat(CHAT_HI, web_search_options=True), "web_search_options"
    ),
    case("modalities with audio", chat(CHAT_HI, modalities=["text", "audio"]), "modalities"),
    case(
        "prompt_cache_options a string",
        chat(CHAT_HI, prompt_cache_options="x"),
        "prompt_cache_options",
    ),
    case("output_config a string", chat(CHAT_HI, output_config="x"), "output_config"),
    case(
        "output_config.effort a number",
        chat(CHAT_HI, output_config={"effort": 5}),
        "output_config.effort",
    ),
    case("betas with a number", chat(CHAT_HI, betas=[5]), "betas"),
    case("betas that would be two headers", chat(CHAT_HI, betas="a\r\nx: y"), "betas"),
    case(
        "anthropic_beta that would be two headers",
        chat(CHAT_HI, anthropic_beta="a\nb"),
        "anthropic_beta",
    ),
    case("cache_control a string", chat(CHAT_HI, cache_control="x"), "cache_control"),
    case("container a number", chat(CHAT_HI, container=5), "container"),
    case("context_management a list", chat(CHAT_HI, context_management=[1]), "context_management"),
    case("mcp_servers a string", chat(CHAT_HI, mcp_servers="x"), "mcp_servers"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_chat_request_refused(body: JSON, param: str) -> None:
    with pytest.raises(shim.RequestError) as caught:
        requested(body)
    assert (caught.value.status, caught.value.param) == (400, param)


# One of everything, to be spoiled in each of its places.
RICH: JSON = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "S", "cache_control": MARK}]},
        {
            "role": "user",
            "name": "n",
            "content": [{"type": "image_url", "image_url": {"url": f"data:;base64,{PNG}"}}],
        },
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c0", "name": "g", "input": {}}],
            "refusal": None,
            "tool_calls": [call("c1", "{}", cache_control=MARK)],
            "thinking_blocks": [THOUGHT],
            "reasoning_details": [{"type": "reasoning.text", "text": "t", "signature": "s"}],
        },
        answer("c1", [{"type": "text", "text": "a"}, image("image/png", PNG)]),
        {"role": "user", "content": [{**result("c0", [says("b")]), "cache_control": MARK}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
        {"role": "function", "name": "f", "content": "x"},
        {
            "role": "user",
            "content": [
                {"type": "file", "file": {"filename": "a", "file_data": PDF}},
                {**document("text", "text/plain", "x"), "citations": {"enabled": True}},
                {"type": "text", "text": "c", "prompt_cache_breakpoint": {"ttl": "12h"}},
            ],
        },
    ],
    "tools": [
        function(strict=True, parameters={**CITY, "definitions": {"A": {}}, "$defs": {"B": {}}}),
        function("u", parameters={"anyOf": [{"properties": {"a": {}}, "required": ["a"]}]}),
        {"type": "custom", "custom": {"name": "p", "format": {"grammar": {"definition": "d"}}}},
        {"type": "web_search_20250305", "name": "web_search", "cache_control": MARK},
        {"name": "native", "input_schema": CITY},
    ],
    "tool_choice": {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [function()]},
    },
    "response_format": schema_format(PERSON),
    "stop": ["a"],
    "temperature": 1,
    "top_p": 0.5,
    "top_k": 5,
    "n": 1,
    "max_tokens": 5000,
    "stream_options": {"include_usage": True},
    "reasoning_effort": "low",
    "reasoning": {"effort": "low", "enabled": True, "max_tokens": 2000},
    "thinking": {"type": "enabled", "budget_tokens": 2000, "display": "summarized"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
    "user": "u",
    "prompt_cache_options": {"mode": "explicit"},
    "cache_control": MARK,
    "web_search_options": {"user_location": {"approximate": {"city": "Bern"}}},
    "betas": ["b"],
    "metadata": {"a": "b"},
    "modalities": ["text"],
}
WRONG: Tuple[Any, ...] = (None, True, -1, 1.5, "x", "", [], [[]], [5], {}, {"x": []})


def spoiled(value: Any) -> Iterator[Any]:
    """The value with each of its places, one after the other, filled with something wrong."""
    yield from WRONG
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: other} for other in spoiled(inner))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from ([*value[:number], other, *value[number + 1 :]] for other in spoiled(inner))


def test_chat_the_rich_request_is_taken() -> None:
    assert faults(requested(RICH)) == []


@pytest.mark.parametrize("field", list(RICH))
def test_chat_a_wrong_type_at_any_depth_is_refused_by_name_or_harmless_s3_b17(field: str) -> None:
    """Never a TypeError; what is taken keeps Anthropic's rules (S4-B1, S4-B22)."""
    models = [shim.known_model(OPUS), shim.known_model("claude-haiku-4-5")]
    trouble = []
    for value in spoiled(RICH[field]):
        body = {**RICH, field: value}
        try:
            request = requested(body)
            found = [f for model in models for f in faults(shim.adapted(request, model).request)]
            trouble += [(value, fault) for fault in dict.fromkeys(found)]
        except shim.RequestError as error:
            if str(error.param).partition(".")[0] not in body:
                trouble.append((value, f"param {error.param}"))
        except Exception as error:
            trouble.append((value, repr(error)))
    assert len(trouble) == 0, trouble[:5]


# --- (c) what is ignored

IGNORED = [
    case("nothing", {}, []),
    case(
        "fields that Claude has no place for",
        {
            "seed": 42,
            "logit_bias": {"50256": -100},
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "logprobs": True,
            "top_logprobs": 3,
            "store": True,
            "metadata": {"a": "b"},
            "prediction": {"type": "content", "content": "x"},
            "audio": {"voice": "x"},
            "moderation": {"model": "m"},
            "service_tier": "flex",
            "verbosity": "low",
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
        },
        [
            "audio",
            "frequency_penalty",
            "logit_bias",
            "logprobs",
            "metadata",
            "moderation",
            "prediction",
            "presence_penalty",
            "prompt_cache_key",
            "prompt_cache_retention",
            "seed",
            "service_tier",
            "store",
            "top_logprobs",
            "verbosity",
        ],
    ),
    case(
        "not those that ask for nothing",
        {
            "seed": None,
            "logit_bias": {},
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "logprobs": False,
            "top_logprobs": 0,
            "store": False,
            "metadata": {},
            "service_tier": "auto",
            "modalities": ["text"],
            "prompt_cache_key": "",
        },
        [],
    ),
    case(
        "fields that nobody knows",
        {"enable_thinking": True, "num_ctx": 4096, "best_of": 2, "keep_alive": None},
        ["best_of", "enable_thinking", "num_ctx"],
    ),
    case("an unknown effort", {"reasoning_effort": "ultra"}, ["reasoning_effort"]),
    case("blank stops", {"stop": ["a", " "]}, ["stop"]),
    case(
        "keywords of schemas",
        {
            "response_format": schema_format(PERSON),
            "tools": [function(strict=True, parameters={"properties": {"a": {"pattern": "x"}}})],
        },
        ["response_format.minItems", "response_format.minimum", "tools.0.function.pattern"],
    ),
    case(
        "the size of a search",
        {"web_search_options": {"search_context_size": "high"}},
        ["web_search_options.search_context_size"],
    ),
    case(
        "spoken answers of the past",
        {"messages": [CHAT_HI, {"role": "assistant", "audio": {"id": "a"}}, CHAT_HI]},
        ["messages.audio"],
    ),
    case(
        "items of a Responses body",
        {"messages": None, "input": [{"type": "reasoning"}, {"role": "user", "content": "hi"}]},
        ["input.reasoning"],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), IGNORED)
def test_chat_ignored_fields_are_named(fields: JSON, expected: List[str]) -> None:
    draft = shim.messages_request_from_chat({**chat(CHAT_HI), **fields}, OPUS)
    assert sorted(draft.ignored) == expected


# CompletionCreateParams of openai 3.52.0 (wire/openai.md 1.1).
CHAT_FIELDS = frozenset(
    "messages model audio frequency_penalty function_call functions logit_bias logprobs "
    "max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls "
    "prediction presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention "
    "reasoning_effort response_format safety_identifier seed service_tier stop store stream "
    "stream_options temperature tool_choice tools top_logprobs top_p user verbosity "
    "web_search_options".split()
)


def test_chat_each_field_is_in_one_table() -> None:
    tables = [set(shim.CHAT_REQUEST), set(shim.CHAT_IGNORED), set(shim.CHAT_REJECTED)]
    assert CHAT_FIELDS - set.union(*tables) == set()
    assert sum(map(len, tables)) == len(set.union(*tables))


# --- (g) nothing given is changed


@pytest.mark.parametrize(
    "body", [row.values[0] for row in [*ROLES, *HISTORY, *THINKING, *CACHE_MARKS]] + [RICH]
)
def test_chat_request_leaves_its_body_alone(body: JSON) -> None:
    before = json.dumps(body)
    request = requested(body)
    shim.adapted(request, shim.known_model("claude-haiku-4-5"))
    shim.with_prompt_cache(request, "1h")
    assert json.dumps(body) == before


@pytest.mark.parametrize(
    "body", [row.values[0] for row in [*ROLES, *HISTORY, *THINKING, *CACHE_MARKS]]
)
def test_chat_request_keeps_the_rules_of_anthropic(body: JSON) -> None:
    request = requested(body)
    for model in (OPUS, "claude-sonnet-5", "claude-haiku-4-5"):
        assert faults(shim.adapted(request, shim.known_model(model)).request) == []


# --- (d) answers


def chat_message_of(*content: JSON, stop_reason: Optional[str] = "end_turn", **more: Any) -> JSON:
    """A message of Anthropic's, as MessageAssembler makes it."""
    return {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-opus-5-5",
        "content": list(content),
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 25, "output_tokens": 15},
        **more,
    }


def usage(prompt: int, completion: int, read: int = 0, written: int = 0, thinking: int = 0) -> JSON:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": read,
            "audio_tokens": 0,
            "cache_write_tokens": written,
        },
        "completion_tokens_details": {
            "reasoning_tokens": thinking,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": read,
    }


def completion(*choices: JSON, usage: JSON) -> JSON:
    return {
        "id": "chatcmpl-msg_01",
        "object": "chat.completion",
        "created": 7,
        "model": "claude-opus-5-5",
        "choices": list(choices),
        "usage": usage,
        "service_tier": "default",
        "system_fingerprint": "claude_shim",
    }


def choice(finish_reason: str, content: Optional[str], **message: Any) -> JSON:
    """The first choice; a `stop_details` belongs to it, everything else to its message."""
    details = {"stop_details": message.pop("stop_details")} if "stop_details" in message else {}
    said = {"role": "assistant", "content": content, "refusal": None, "annotations": [], **message}
    return {
        "index": 0,
        "message": said,
        "logprobs": None,
        "finish_reason": finish_reason,
        **details,
    }


def cited(start: int, end: int, url: str, title: str) -> JSON:
    place = {"start_index": start, "end_index": end, "title": title, "url": url}
    return {"type": "url_citation", "url_citation": place}


def found_at(url: str, **more: Any) -> JSON:
    """A web citation of Anthropic's."""
    return {"type": "web_search_result_location", "url": url, "cited_text": "...", **more}


DECLINED: JSON = {"type": "refusal", "category": "cyber", "explanation": "Declined because of X."}
REPLY = shim.ChatReply(created=7)

ANSWERS = [
    case("text", chat_message_of(says("Hell\u00f6")), REPLY, choice("stop", "Hell\u00f6")),
    case(
        "text of several blocks is one content (S3-B1, S4-B10)",
        chat_message_of(says("a"), says("b\n"), says("c")),
        REPLY,
        choice("stop", "ab\nc"),
    ),
    case("nothing at all", chat_message_of(), REPLY, choice("stop", "")),
    case(
        "text is never read as calls (S4-B11)",
        chat_message_of(says('<tool_use>{"name":"f"}</tool_use>')),
        REPLY,
        choice("stop", '<tool_use>{"name":"f"}</tool_use>'),
    ),
    case(
        "calls alone have null content",
        chat_message_of(use("t1", city="Paris"), use("t2", "g"), stop_reason="tool_use"),
        REPLY,
        choice(
            "tool_calls", None, tool_calls=[call("t1", '{"city":"Paris"}'), call("t2", "{}", "g")]
        ),
    ),
    case(
        "text stays beside calls",
        chat_message_of(says("Checking."), use("t1"), says(" Done."), stop_reason="tool_use"),
        REPLY,
        choice("tool_calls", "Checking. Done.", tool_calls=[call("t1")]),
    ),
    case(
        "a call is tool_calls whatever the stop reason says",
        chat_message_of(use("t1"), stop_reason="end_turn"),
        REPLY,
        choice("tool_calls", None, tool_calls=[call("t1")]),
    ),
    case(
        "a stop for calls that run upstream is no tool_calls",
        chat_message_of(
            says("a"),
            {**use("s1", "web_search"), "type": "server_tool_use"},
            stop_reason="tool_use",
        ),
        REPLY,
        choice("stop", "a"),
    ),
    case(
        "a call that was cut off shows what there is of it",
        chat_message_of({**use("t1"), "partial_json": '{"city": "Par'}, stop_reason="max_tokens"),
        REPLY,
        choice("length", None, tool_calls=[call("t1", '{"city": "Par')]),
    ),
    case(
        "thinking is readable, and whole for the way back (S3-B18, S4-B14)",
        chat_message_of(THOUGHT, HIDDEN, says("a")),
        REPLY,
        choice("stop", "a", reasoning_content="Hm.", thinking_blocks=[THOUGHT, HIDDEN]),
    ),
    case(
        "thinking that is not shown is only for the way back (S4-B13)",
        chat_message_of({**THOUGHT, "thinking": ""}, HIDDEN, says("a")),
        REPLY,
        choice("stop", "a", thinking_blocks=[{**THOUGHT, "thinking": ""}, HIDDEN]),
    ),
    case(
        "citations count characters of the whole content (S3-B18)",
        chat_message_of(
            says("\u4e16\U0001f600 "),
            {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
            says(
                "21C",
                citations=[found_at("https://a.example", title="A"), found_at("https://b.example")],
            ),
            says(".", citations=None),
            says("x", citations=[{"type": "char_location", "cited_text": "x"}]),
            says(
                "y",
                citations=[
                    {
                        "type": "search_result_location",
                        "source": "https://c.example",
                        "title": "C",
                        "cited_text": "y",
                    }
                ],
            ),
        ),
        REPLY,
        choice(
            "stop",
            "\u4e16\U0001f600 21C.xy",
            annotations=[
                cited(3, 6, "https://a.example", "A"),
                cited(3, 6, "https://b.example", "https://b.example"),
                cited(8, 9, "https://c.example", "C"),
            ],
        ),
    ),
    case(
        "blocks of unknown kinds are skipped",
        chat_message_of(
            {"type": "connector_text", "text": "psst"}, {"type": "fallback"}, says("a")
        ),
        REPLY,
        choice("stop", "a"),
    ),
    case(
        "a refusal without words (S2-F8, S4-B8)",
        chat_message_of(stop_reason="refusal", stop_details=DECLINED),
        REPLY,
        choice("content_filter", "", stop_details=DECLINED),
    ),
    case(
        "a refusal keeps the text so far, and refusal stays null",
        chat_message_of(says("Well"), stop_reason="refusal", stop_details=None),
        REPLY,
        choice("content_filter", "Well"),
    ),
    case(
        "a refusal is told where a schema was asked for",
        chat_message_of(stop_reason="refusal", stop_details=DECLINED),
        REPLY._replace(json_schema=True),
        choice("content_filter", "", refusal="Declined because of X.", stop_details=DECLINED),
    ),
    case(
        "a refusal without an explanation has one sentence",
        chat_message_of(stop_reason="refusal"),
        REPLY._replace(json_schema=True),
        choice("content_filter", "", refusal="The model declined to answer."),
    ),
    case(
        "a custom call gets its text back (#27)",
        chat_message_of(use("t1", "p_1", input="*** Begin"), use("t2"), stop_reason="tool_use"),
        REPLY._replace(names={"p_1": "p.1"}, custom_tools=frozenset({"p.1"})),
        choice(
            "tool_calls",
            None,
            tool_calls=[
                {"id": "t1", "type": "custom", "custom": {"name": "p.1", "input": "*** Begin"}},
                call("t2"),
            ],
        ),
    ),
    case(
        "a custom call that was cut off shows what there is of it",
        chat_message_of(
            {**use("t1", "p"), "partial_json": '{"input": "*** B'}, stop_reason="max_tokens"
        ),
        REPLY._replace(custom_tools=frozenset({"p"})),
        choice(
            "length",
            None,
            tool_calls=[
                {"id": "t1", "type": "custom", "custom": {"name": "p", "input": '{"input": "*** B'}}
            ],
        ),
    ),
    case(
        "a legacy client gets function_call",
        chat_message_of(use("t1", "fn_old_9c5b44c6", a=1), stop_reason="tool_use"),
        REPLY._replace(legacy=True, names={"fn_old_9c5b44c6": "fn.old"}),
        choice("function_call", None, function_call={"name": "fn.old", "arguments": '{"a":1}'}),
    ),
    case(
        "one fence around a JSON object goes (#24)",
        chat_message_of(says('```json\n{"a": 1}\n```\n')),
        REPLY._replace(json_object=True),
        choice("stop", '{"a": 1}'),
    ),
    case(
        "a fence stays where no JSON object was asked for",
        chat_message_of(says('```json\n{"a": 1}\n```')),
        REPLY,
        choice("stop", '```json\n{"a": 1}\n```'),
    ),
]


def chat_answer(messages: Sequence[JSON], reply: shim.ChatReply) -> JSON:
    """The completion, which its JSON says to the byte, made by the short way or not."""
    answer = shim.chat_from_messages(messages, reply)
    assert shim.chat_json(messages, reply) == shim.dumps(answer)
    return answer


@pytest.mark.parametrize(("message", "reply", "expected"), ANSWERS)
def test_chat_answer(message: JSON, reply: shim.ChatReply, expected: JSON) -> None:
    before = json.dumps(message)
    assert chat_answer([message], reply) == completion(expected, usage=usage(25, 15))
    assert json.dumps(message) == before


def test_the_json_of_any_chat_answer_is_that_of_its_completion() -> None:
    chance = random.Random(1)
    words = ["%", "%(id)b", '"', "\\", "\u00e9", "\u2028", "\ud83d", "5", ":7,", "", "a b", "%%d"]

    def text() -> str:
        return "".join(chance.choices(words, k=chance.randrange(4)))

    def number() -> Any:
        return chance.choice([0, 1, 2, 3, 4, 5, 7, 8, 15, 10**18, -1, None, True, 1.5, "x"])

    names = ("input_tokens", "output_tokens", "cache_read_input_tokens")
    for _ in range(2000):
        told = {name: number() for name in (*names, "cache_creation_input_tokens")}
        told["output_tokens_details"] = chance.choice([None, {"thinking_tokens": number()}])
        blocks = chance.choices([says(text()), says(text(), citations=None), use("t1")], k=2)
        message = chat_message_of(
            *blocks[: chance.choice([0, 1, 1, 1, 2])],
            id=chance.choice([text(), None]),
            model=chance.choice([text(), 5]),
            stop_reason=chance.choice(["end_turn", "tool_use", "refusal", None, text()]),
            stop_details=chance.choice([None, None, None, DECLINED]),
            usage=chance.choice([told, told, told, {}, None]),
        )
        chat_answer(
            [message], REPLY._replace(created=chance.randrange(20), json_schema=bool(text()))
        )


def test_forms_of_answers_are_not_kept_by_reasons_that_are_not_known() -> None:
    """They may be large, as may all that upstream says."""
    chat_answer([chat_message_of(says("a"), stop_reason="moon phase")], REPLY)
    kept = shim._plain_text_form.cache_info().currsize
    chat_answer([chat_message_of(says("a"), stop_reason="m" * 10**6)], REPLY)
    assert shim._plain_text_form.cache_info().currsize == kept


STOP_REASONS = [
    case("end_turn", "end_turn", "stop"),
    case("stop_sequence", "stop_sequence", "stop"),
    case("pause_turn", "pause_turn", "stop"),
    case("max_tokens (S2-F8, S4-B8)", "max_tokens", "length"),
    case("the window is full", "model_context_window_exceeded", "length"),
    case("compaction", "compaction", "length"),
    case("refusal (S2-F8, S4-B8)", "refusal", "content_filter"),
    case("tool_use without a call", "tool_use", "stop"),
    case("a reason of the future", "moon_phase", "stop"),
    case("no reason", None, "stop"),
]


@pytest.mark.parametrize(("reason", "expected"), STOP_REASONS)
def test_chat_finish_reason(reason: Optional[str], expected: str) -> None:
    answer = chat_answer([chat_message_of(says("a"), stop_reason=reason)], REPLY)
    assert answer["choices"] == [choice(expected, "a")]


USAGES = [
    case("plain", {"input_tokens": 25, "output_tokens": 15}, usage(25, 15)),
    case(
        "what the cache gave and took is part of the prompt (#8 #9, S4-B19)",
        {
            "input_tokens": 12,
            "cache_creation_input_tokens": 1500,
            "cache_read_input_tokens": 8000,
            "output_tokens": 90,
            "output_tokens_details": {"thinking_tokens": 40},
        },
        usage(9512, 90, read=8000, written=1500, thinking=40),
    ),
    case(
        "null and nonsense count as 0 (S2-F3)",
        {
            "input_tokens": 5,
            "cache_read_input_tokens": None,
            "cache_creation_input_tokens": "x",
            "output_tokens_details": None,
        },
        usage(5, 0),
    ),
    case("none", {}, usage(0, 0)),
]


@pytest.mark.parametrize(("told", "expected"), USAGES)
def test_chat_usage(told: JSON, expected: JSON) -> None:
    answer = chat_answer([chat_message_of(says("a"), usage=told)], REPLY)
    assert answer == completion(choice("stop", "a"), usage=expected)


def test_chat_several_choices_sum_their_usage() -> None:
    messages = [
        chat_message_of(says("a")),
        chat_message_of(
            use("t1"),
            id="msg_02",
            stop_reason="tool_use",
            usage={"input_tokens": 5, "cache_read_input_tokens": 20, "output_tokens": 1},
        ),
    ]
    assert chat_answer(messages, REPLY) == completion(
        choice("stop", "a"),
        {**choice("tool_calls", None, tool_calls=[call("t1")]), "index": 1},
        usage=usage(50, 16, read=20),
    )


FENCES = [
    case("no fence", '{"a": 1}\n', '{"a": 1}\n'),
    case("a fence with a language", '```json\n{"a": 1}\n```', '{"a": 1}'),
    case("a fence without one", '```\n{"a": 1}\n```\n\n', '{"a": 1}'),
    case("a fence after a blank line", '\n```json\n{"a": "x`y"}\n```', '{"a": "x`y"}'),
    case("a fence that never ends", '```json\n{"a": 1', '{"a": 1'),
    case("fences inside a string", '{"a": "```\\n```"}', '{"a": "```\\n```"}'),
    case("white space that is text", ' \n {"a": 1} ', ' \n {"a": 1} '),
    case("an end of a fence without a start", "x = 1\n```", "x = 1\n```"),
    case("one backtick", "`", "`"),
    case("nothing", "", ""),
]


@pytest.mark.parametrize(("text", "expected"), FENCES)
def test_chat_fence_cut_anywhere(text: str, expected: str) -> None:
    for cut in range(len(text) + 1):
        unfenced = shim.Unfenced()
        assert unfenced.feed(text[:cut]) + unfenced.feed(text[cut:]) + unfenced.end() == expected
    unfenced = shim.Unfenced()
    assert "".join([*map(unfenced.feed, text), unfenced.end()]) == expected
    assert "".join(shim.Unfenced().whole(text)) == expected


# --- (e) streams: events, each with the chunks that it makes

Step = Tuple[JSON, List[Any]]

CHUNK: JSON = {
    "id": "chatcmpl-msg_01",
    "object": "chat.completion.chunk",
    "created": 7,
    "model": "claude-opus-5-5",
    "service_tier": "default",
    "system_fingerprint": "claude_shim",
}
TEXT_CHUNK: JSON = {**CHUNK, "id": "cmpl-msg_01", "object": "text_completion"}


def delta(**delta: Any) -> JSON:
    only = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return {**CHUNK, "choices": [only]}


def finish(reason: str, **more: Any) -> JSON:
    only = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason, **more}
    return {**CHUNK, "choices": [only]}


def call_delta(index: int, **more: Any) -> JSON:
    return delta(tool_calls=[{"index": index, **more}])


def arguments(index: int, piece: str) -> JSON:
    return call_delta(index, function={"arguments": piece})


def opened(index: int, id: str, name: str) -> JSON:
    return call_delta(index, id=id, type="function", function={"name": name, "arguments": ""})


def completed(text: str, finish_reason: Optional[str] = None) -> JSON:
    """A chunk of a legacy completion."""
    only = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return {**TEXT_CHUNK, "choices": [only]}


def counted(chunk: JSON, usage: Optional[JSON] = None) -> JSON:
    """A chunk for a client that asked for usage."""
    return {**chunk, "usage": usage}


ROLE = delta(role="assistant", content="", refusal=None)
CHAT_START: Step = (message_start(), [ROLE])


def stop(reason: str, **more: Any) -> List[Step]:
    """The last two events, for a finish reason that needs no upstream one of its own."""
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    upstream = {**reasons, "content_filter": "refusal", "function_call": "tool_use"}[reason]
    return [
        (message_delta(upstream), []),
        (MESSAGE_STOP, [*more.get("before", []), finish(reason), "[DONE]"]),
    ]


TEXT_OPEN: Step = (block_start(0, type="text", text=""), [])
SUM_UP: List[Step] = [
    TEXT_OPEN,
    (text_delta(0, "s\u00fcm"), [delta(content="s\u00fcm")]),
    (block_stop(0), []),
]


class Playbook(NamedTuple):
    """A stream: each event with the chunks that the client gets for it, at once."""

    steps: List[Step]
    reply: shim.ChatReply = REPLY
    encoder: Type[shim.ChatStreamEncoder] = shim.ChatStreamEncoder

    def events(self) -> List[JSON]:
        return [event for event, _ in self.steps]

    def chunks(self, number: Optional[int] = None) -> List[Any]:
        return [made for _, step in self.steps[:number] for made in step]

    def transform(self) -> shim.EventTransform:
        return shim.EventTransform(self.encoder(self.reply))


PLAYBOOKS = [
    case(
        "text (4.2; S3-B5 role and id, S3-B6 the reason is in the delta)",
        Playbook(
            [
                CHAT_START,
                TEXT_OPEN,
                (PING, []),
                (text_delta(0, "Hel"), [delta(content="Hel")]),
                (
                    text_delta(0, "l\u00f6 \u4e16\U0001f600"),
                    [delta(content="l\u00f6 \u4e16\U0001f600")],
                ),
                (block_stop(0), []),
                (message_delta("end_turn"), []),
                (MESSAGE_STOP, [finish("stop"), "[DONE]"]),
            ]
        ),
    ),
    case(
        "text, then two parallel tools (4.3; S3-B2 S3-B3 S3-B4, S4-B24, #1 #2 #23)",
        Playbook(
            [
                CHAT_START,
                TEXT_OPEN,
                (
                    text_delta(0, "Okay, let\u2019s check:"),
                    [delta(content="Okay, let\u2019s check:")],
                ),
                (block_stop(0), []),
                (
                    block_start(1, type="tool_use", id="toolu_01T", name="get_weather", input={}),
                    [opened(0, "toolu_01T", "get_weather")],
                ),
                (json_delta(1, ""), []),
                (json_delta(1, '{"location":'), [arguments(0, '{"location":')]),
                (json_delta(1, ' "San Francisc'), [arguments(0, ' "San Francisc')]),
                (json_delta(1, 'o, CA"}'), [arguments(0, 'o, CA"}')]),
                (block_stop(1), []),
                (
                    block_start(2, type="tool_use", id="toolu_01U", name="get_time", input={}),
                    [opened(1, "toolu_01U", "get_time")],
                ),
                (json_delta(2, ""), []),
                (block_stop(2), [arguments(1, "{}")]),
                (message_delta("tool_use"), []),
                (MESSAGE_STOP, [finish("tool_calls"), "[DONE]"]),
            ]
        ),
    ),
    case(
        "thinking, redacted thinking (4.4; S3-B1 S3-B18, S4-B14): choice 0, blocks once",
        Playbook(
            [
                CHAT_START,
                (block_start(0, type="thinking", thinking="", signature=""), []),
                (
                    block_delta(0, type="thinking_delta", thinking="1071 = 2 \u00d7 462"),
                    [delta(reasoning_content="1071 = 2 \u00d7 462")],
                ),
                (
                    block_delta(0, type="thinking_delta", thinking=" + 147"),
                    [delta(reasoning_content=" + 147")],
                ),
                (block_delta(0, type="signature_delta", signature="EqQB"), []),
                (
                    block_stop(0),
                    [
                        delta(
                            thinking_blocks=[
                                {
                                    "index": 0,
                                    "type": "thinking",
                                    "thinking": "1071 = 2 \u00d7 462 + 147",
                                    "signature": "EqQB",
                                }
                            ]
                        )
                    ],
                ),
                (block_start(1, type="redacted_thinking", data="Emw"), []),
                (
                    block_stop(1),
                    [
                        delta(
                            thinking_blocks=[
                                {"index": 1, "type": "redacted_thinking", "data": "Emw"}
                            ]
                        )
                    ],
                ),
                (block_start(2, type="text", text=""), []),
                (text_delta(2, "21"), [delta(content="21")]),
                (block_stop(2), []),
                *stop("stop"),
            ]
        ),
    ),
    case(
        "thinking that is not shown has only a signature",
        Playbook(
            [
                CHAT_START,
                (block_start(0, type="thinking", thinking="", signature=""), []),
                (block_delta(0, type="signature_delta", signature="EqQB\u00e9"), []),
                (
                    block_stop(0),
                    [
                        delta(
                            thinking_blocks=[
                                {
                                    "index": 0,
                                    "type": "thinking",
                                    "thinking": "",
                                    "signature": "EqQB\u00e9",
                                }
                            ]
                        )
                    ],
                ),
                *stop("stop"),
            ]
        ),
    ),
    case(
        "server tool and citations (4.5): skipped, annotations in one chunk, later usage counts",
        Playbook(
            [
                (message_start(), [counted(ROLE)]),
                (block_start(0, type="text", text=""), []),
                (text_delta(0, "S\u00e9arching. "), [counted(delta(content="S\u00e9arching. "))]),
                (block_stop(0), []),
                (
                    block_start(
                        1, type="server_tool_use", id="srvtoolu_014", name="web_search", input={}
                    ),
                    [],
                ),
                (json_delta(1, '{"query": "weather NYC"}'), []),
                (block_stop(1), []),
                (
                    block_start(
                        2,
                        type="web_search_tool_result",
                        tool_use_id="srvtoolu_014",
                        content=[
                            {
                                "type": "web_search_result",
                                "title": "W",
                                "url": "https://w.example",
                                "encrypted_content": "Ev0D",
                                "page_age": None,
                            }
                        ],
                    ),
                    [],
                ),
                (block_stop(2), []),
                (block_start(3, type="text", text="", citations=[]), []),
                (
                    block_delta(
                        3, type="citations_delta", citation=found_at("https://w.example", title="W")
                    ),
                    [],
                ),
                (text_delta(3, "21"), [counted(delta(content="21"))]),
                (text_delta(3, "C."), [counted(delta(content="C."))]),
                (block_stop(3), []),
                (
                    message_delta(
                        "end_turn",
                        {
                            "input_tokens": 10682,
                            "cache_creation_input_tokens": 0,
                            "cache_read_input_tokens": 0,
                            "output_tokens": 510,
                            "server_tool_use": {"web_search_requests": 1},
                        },
                    ),
                    [],
                ),
                (
                    MESSAGE_STOP,
                    [
                        counted(delta(annotations=[cited(11, 15, "https://w.example", "W")])),
                        counted(finish("stop")),
                        counted({**CHUNK, "choices": []}, usage(10682, 510)),
                        "[DONE]",
                    ],
                ),
            ],
            REPLY._replace(annotated=True, include_usage=True),
        ),
    ),
    case(
        "refusal before output (4.6; S4-B8)",
        Playbook(
            [
                (message_start(id="msg_01", extra="\u00e9"), [ROLE]),
                (message_delta("refusal", {"output_tokens": 0}, stop_details=DECLINED), []),
                (MESSAGE_STOP, [finish("content_filter", stop_details=DECLINED), "[DONE]"]),
            ]
        ),
    ),
    case(
        "refusal in the middle of the text (4.6)",
        Playbook(
            [
                CHAT_START,
                TEXT_OPEN,
                (text_delta(0, "Wel\u00ed"), [delta(content="Wel\u00ed")]),
                (block_stop(0), []),
                (message_delta("refusal", stop_details=DECLINED), []),
                (MESSAGE_STOP, [finish("content_filter", stop_details=DECLINED), "[DONE]"]),
            ]
        ),
    ),
    case(
        "refusal where a schema was asked for",
        Playbook(
            [
                CHAT_START,
                (PING, []),
                (
                    message_delta("refusal", stop_details={**DECLINED, "explanation": "N\u00f3."}),
                    [],
                ),
                (
                    MESSAGE_STOP,
                    [
                        delta(refusal="N\u00f3."),
                        finish(
                            "content_filter", stop_details={**DECLINED, "explanation": "N\u00f3."}
                        ),
                        "[DONE]",
                    ],
                ),
            ],
            REPLY._replace(json_schema=True),
        ),
    ),
    case(
        "pause_turn that nobody resumed (4.6)",
        Playbook(
            [
                CHAT_START,
                *SUM_UP,
                (
                    block_start(1, type="server_tool_use", id="s1", name="web_search", input={}),
                    [],
                ),
                (json_delta(1, '{"query": "x"}'), []),
                (block_stop(1), []),
                (message_delta("pause_turn", {"output_tokens": 812}), []),
                (MESSAGE_STOP, [finish("stop"), "[DONE]"]),
            ]
        ),
    ),
    case(
        "the boundary of a fallback is skipped (4.6)",
        Playbook(
            [
                CHAT_START,
                *SUM_UP,
                (
                    block_start(
                        1, type="fallback", **{"from": {"model": "a"}, "to": {"model": "b"}}
                    ),
                    [],
                ),
                (block_stop(1), []),
                (block_start(2, type="text", text=""), []),
                (text_delta(2, " up"), [delta(content=" up")]),
                (block_stop(2), []),
                *stop("stop"),
            ]
        ),
    ),
    case(
        "unknown events, deltas and blocks are skipped",
        Playbook(
            [
                ({"type": "weather_report", "text": "x"}, []),
                CHAT_START,
                TEXT_OPEN,
                (block_delta(0, type="smell_delta", text="\u00e9"), []),
                (text_delta(0, "a"), [delta(content="a")]),
                (block_delta(0, type="thinking_tokens_delta", thinking=5), []),
                (block_stop(0), []),
                ({"type": "content_block_progress", "index": 0}, []),
                (block_start(1, type="connector_text", text=""), []),
                (text_delta(1, "psst"), []),
                (block_stop(1), []),
                (block_start(2, type="mcp_tool_use", id="m1", name="f", input={}), []),
                (json_delta(2, '{"a":1}'), []),
                (block_stop(2), []),
                *stop("stop"),
            ]
        ),
    ),
    case(
        "usage only at the end, on request; null leaves what message_start told (S3-B8, S4-B23)",
        Playbook(
            [
                (
                    message_start(
                        usage={
                            "input_tokens": 12,
                            "cache_creation_input_tokens": 1500,
                            "cache_read_input_tokens": 8000,
                            "output_tokens": 1,
                        }
                    ),
                    [counted(ROLE)],
                ),
                TEXT_OPEN,
                (text_delta(0, "\u00e9"), [counted(delta(content="\u00e9"))]),
                (block_stop(0), []),
                (
                    message_delta(
                        "end_turn",
                        {
                            "input_tokens": None,
                            "cache_read_input_tokens": 8001,
                            "output_tokens": 90,
                            "output_tokens_details": {"thinking_tokens": 40},
                        },
                    ),
                    [],
                ),
                (
                    MESSAGE_STOP,
                    [
                        counted(finish("stop")),
                        counted(
                            {**CHUNK, "choices": []},
                            usage(9513, 90, read=8001, written=1500, thinking=40),
                        ),
                        "[DONE]",
                    ],
                ),
            ],
            REPLY._replace(include_usage=True),
        ),
    ),
    case(
        "several message_deltas make one finish (S3-B7)",
        Playbook(
            [
                CHAT_START,
                *SUM_UP,
                ({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 3}}, []),
                (message_delta("max_tokens"), []),
                ({"type": "message_delta", "delta": {"container": None}}, []),
                (MESSAGE_STOP, [finish("length"), "[DONE]"]),
            ]
        ),
    ),
    case(
        "arguments: none at all, {} as it stands, whole in the start, white space",
        Playbook(
            [
                CHAT_START,
                (
                    block_start(0, type="tool_use", id="t0", name="f\u00e9", input={}),
                    [opened(0, "t0", "f\u00e9")],
                ),
                (block_stop(0), [arguments(0, "{}")]),
                (
                    block_start(1, type="tool_use", id="t1", name="f", input={}),
                    [opened(1, "t1", "f")],
                ),
                (json_delta(1, "{}"), [arguments(1, "{}")]),
                (block_stop(1), []),
                (
                    block_start(2, type="tool_use", id="t2", name="f", input={"a": "\u00e9"}),
                    [opened(2, "t2", "f")],
                ),
                (block_stop(2), [arguments(2, '{"a":"\\u00e9"}')]),
                (
                    block_start(3, type="tool_use", id="t3", name="f", input={}),
                    [opened(3, "t3", "f")],
                ),
                (json_delta(3, " "), [arguments(3, " ")]),
                (block_stop(3), [arguments(3, "{}")]),
                *stop("tool_calls"),
            ]
        ),
    ),
    case(
        "text after a call goes on as content of the same choice (#40)",
        Playbook(
            [
                CHAT_START,
                (
                    block_start(0, type="tool_use", id="t0", name="f", input={}),
                    [opened(0, "t0", "f")],
                ),
                (json_delta(0, '{"a":"\u00e9"}'), [arguments(0, '{"a":"\u00e9"}')]),
                (block_stop(0), []),
                (block_start(1, type="text", text=""), []),
                (text_delta(1, "More."), [delta(content="More.")]),
                (block_stop(1), []),
                *stop("tool_calls"),
            ]
        ),
    ),
    case(
        "a call is tool_calls whatever the stop reason says",
        Playbook(
            [
                CHAT_START,
                (
                    block_start(0, type="tool_use", id="t0", name="f", input={}),
                    [opened(0, "t0", "f")],
                ),
                (json_delta(0, '{"a":"\u00e9"}'), [arguments(0, '{"a":"\u00e9"}')]),
                (block_stop(0), []),
                (message_delta("end_turn"), []),
                (MESSAGE_STOP, [finish("tool_calls"), "[DONE]"]),
            ]
        ),
    ),
    case(
        "a call that max_tokens cut off is length, its arguments as they came",
        Playbook(
            [
                CHAT_START,
                (
                    block_start(0, type="tool_use", id="t0", name="f", input={}),
                    [opened(0, "t0", "f")],
                ),
                (json_delta(0, '{"a": "\u00e9'), [arguments(0, '{"a": "\u00e9')]),
                (block_stop(0), []),
                *stop("length"),
            ]
        ),
    ),
    case(
        "a custom call comes whole, under the client's name (#27)",
        Playbook(
            [
                CHAT_START,
                (
                    block_start(0, type="tool_use", id="t0", name="p_1", input={}),
                    [call_delta(0, id="t0", type="custom", custom={"name": "p.1", "input": ""})],
                ),
                (json_delta(0, '{"input": "*** B'), []),
                (json_delta(0, '\u00e9gin\\n"}'), []),
                (block_stop(0), [call_delta(0, custom={"input": "*** B\u00e9gin\n"})]),
                (
                    block_start(1, type="tool_use", id="t1", name="f_1", input={}),
                    [opened(1, "t1", "f.1")],
                ),
                (block_stop(1), [arguments(1, "{}")]),
                *stop("tool_calls"),
            ],
            REPLY._replace(names={"p_1": "p.1", "f_1": "f.1"}, custom_tools=frozenset({"p.1"})),
        ),
    ),
    case(
        "a legacy client gets function_call",
        Playbook(
            [
                CHAT_START,
                (
                    block_start(0, type="tool_use", id="t0", name="f", input={}),
                    [delta(function_call={"name": "f", "arguments": ""})],
                ),
                (
                    json_delta(0, '{"a":"\u00e9"}'),
                    [delta(function_call={"arguments": '{"a":"\u00e9"}'})],
                ),
                (block_stop(0), []),
                *stop("function_call"),
            ],
            REPLY._replace(legacy=True),
        ),
    ),
    case(
        "text that comes with the start of its block is not lost",
        Playbook(
            [
                CHAT_START,
                (block_start(0, type="text", text="\u00c0"), [delta(content="\u00c0")]),
                (text_delta(0, " bient\u00f4t"), [delta(content=" bient\u00f4t")]),
                (block_stop(0), []),
                *stop("stop"),
            ]
        ),
    ),
    case(
        "escapes and line separators of Unicode come through, in ASCII",
        Playbook(
            [
                CHAT_START,
                TEXT_OPEN,
                (
                    text_delta(0, 'a\u2028b\u2029c\u0085d"\\/\n\x00\x7f'),
                    [delta(content='a\u2028b\u2029c\u0085d"\\/\n\x00\x7f')],
                ),
                (block_stop(0), []),
                *stop("stop"),
            ]
        ),
    ),
    case(
        "text that looks like the protocol is text (S4-B9, S4-B11)",
        Playbook(
            [
                CHAT_START,
                TEXT_OPEN,
                (
                    text_delta(0, '\n\ndata: [DONE]\n\n"} \u00e9'),
                    [delta(content='\n\ndata: [DONE]\n\n"} \u00e9')],
                ),
                (block_stop(0), []),
                *stop("stop"),
            ]
        ),
    ),
    case(
        "one fence around a JSON object goes (#24)",
        Playbook(
            [
                CHAT_START,
                TEXT_OPEN,
                (text_delta(0, "``"), []),
                (text_delta(0, '`json\n{"a"'), [delta(content='{"a"')]),
                (text_delta(0, ': "\u00e9"}\n``'), [delta(content=': "\u00e9"}')]),
                (text_delta(0, "`"), []),
                (block_stop(0), []),
                *stop("stop"),
            ],
            REPLY._replace(json_object=True),
        ),
    ),
    case(
        "what might have been a fence comes at the end",
        Playbook(
            [
                CHAT_START,
                TEXT_OPEN,
                (text_delta(0, '```\n{"a": "\u00e9"'), [delta(content='{"a": "\u00e9"')]),
                (text_delta(0, "\n``"), []),
                (block_stop(0), []),
                *stop("length", before=[delta(content="\n``")]),
            ],
            REPLY._replace(json_object=True),
        ),
    ),
    case(
        "the legacy completion: text and a reason, no more",
        Playbook(
            [
                (message_start(), []),
                (block_start(0, type="thinking", thinking="", signature=""), []),
                (block_delta(0, type="thinking_delta", thinking="Hm."), []),
                (block_stop(0), []),
                (block_start(1, type="text", text=""), []),
                (text_delta(1, "Hell\u00f6"), [completed("Hell\u00f6")]),
                (text_delta(1, "\n"), [completed("\n")]),
                (block_stop(1), []),
                (message_delta("max_tokens"), []),
                (MESSAGE_STOP, [completed("", "length"), "[DONE]"]),
            ],
            REPLY,
            shim.CompletionStreamEncoder,
        ),
    ),
    case(
        "the legacy completion with usage",
        Playbook(
            [
                (message_start(), []),
                (block_start(0, type="text", text="\u00c0"), [counted(completed("\u00c0"))]),
                (block_stop(0), []),
                (message_delta("end_turn"), []),
                (
                    MESSAGE_STOP,
                    [
                        counted(completed("", "stop")),
                        counted({**TEXT_CHUNK, "choices": []}, usage(25, 15)),
                        "[DONE]",
                    ],
                ),
            ],
            REPLY._replace(include_usage=True),
            shim.CompletionStreamEncoder,
        ),
    ),
]


def with_cr(raw: bytes) -> bytes:
    return raw.replace(b"\n", b"\r")


def with_crlf(raw: bytes) -> bytes:
    return raw.replace(b"\n", b"\r\n")


def without_space(raw: bytes) -> bytes:
    return raw.replace(b"\nevent: ", b"\nevent:").replace(b"\ndata: ", b"\ndata:")


def data_alone(raw: bytes) -> bytes:
    return re.sub(rb"(?m)^event: .*\n", b"", raw)


def with_comments(raw: bytes) -> bytes:
    return b"\xef\xbb\xbf: hello\n\n" + raw.replace(b"\n\n", b"\nid: 1\n\n:\n\n")


def padded(raw: bytes) -> bytes:
    return raw.replace(b"}\n\n", b"   }\n\n")


def in_several_lines(raw: bytes) -> bytes:
    """A line break where JSON may have one: after the first brace."""
    return raw.replace(b'data: {"', b'data: {\ndata: "')


WRITTEN: List[Callable[[bytes], bytes]] = [
    bytes,
    with_crlf,
    with_cr,
    without_space,
    data_alone,
    with_comments,
    padded,
    in_several_lines,
]


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_chat_stream_whole_and_byte_by_byte(playbook: Playbook) -> None:
    """However the bytes are written and cut (S3-B19), the same chunks in pure ASCII."""
    for written in WRITTEN:
        raw = written(sse(*playbook.events()))
        whole, bytewise = playbook.transform(), playbook.transform()
        at_once = whole.feed(raw)
        assert chunks(at_once) == playbook.chunks(), written.__name__
        in_bytes = b"".join(bytewise.feed(raw[i : i + 1]) for i in range(len(raw)))
        assert in_bytes == at_once, written.__name__
        assert (whole.complete, bytewise.complete) == (True, True)
        assert whole.end() + bytewise.end() == b""


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_chat_stream_split_inside_characters(playbook: Playbook) -> None:
    """A character cut in two must not become U+FFFD (#17)."""
    raw = sse(*playbook.events())
    inside = [i for i, byte in enumerate(raw) if 0x80 <= byte < 0xC0]
    assert inside != []
    for cut in inside:
        transform = playbook.transform()
        assert chunks(transform.feed(raw[:cut]) + transform.feed(raw[cut:])) == playbook.chunks()


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_chat_stream_answers_each_event_at_once(playbook: Playbook) -> None:
    """Nothing is buffered to the end (S2-F5, S4-B20)."""
    transform = playbook.transform()
    made = [chunks(transform.feed(sse(event))) for event in playbook.events()]
    assert made == [step for _, step in playbook.steps]


CUT: JSON = {
    "error": {
        "message": "upstream ended in the middle of the answer",
        "type": "server_error",
        "param": None,
        "code": None,
    }
}


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_chat_stream_cut_off_is_an_error(playbook: Playbook) -> None:
    """At each boundary and inside each event: no finish reason, no [DONE] (S3-B11, #32)."""
    events = playbook.events()
    for number, event in enumerate(events):
        last = sse(event)
        for cut in (0, 1, len(last) // 2, len(last) - 1):
            transform = playbook.transform()
            made = transform.feed(sse(*events[:number]) + last[:cut]) + transform.end()
            assert chunks(made) == [*playbook.chunks(number), CUT]
            assert "[DONE]" not in chunks(made)
            assert transform.feed(last[cut:]) + transform.end() == b""
            assert transform.complete is False


OVERLOADED: JSON = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
OVERLOADED_CHUNK: JSON = {
    "error": {
        "message": "Overloaded",
        "type": "server_error",
        "param": None,
        "code": "server_is_overloaded",
    }
}


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_chat_stream_error_in_the_middle_is_the_last_line(playbook: Playbook) -> None:
    """S3-B12, S3-B13, S4-B9, S4-B23, #32: in OpenAI's form, nothing after it."""
    events = playbook.events()
    for number in range(len(events)):
        raw = sse(*events[:number], OVERLOADED, *events[number:])
        for size in (len(raw), 100):
            transform = playbook.transform()
            made = [transform.feed(raw[i : i + size]) for i in range(0, len(raw), size)]
            made.append(transform.end())
            assert chunks(b"".join(made)) == [*playbook.chunks(number), OVERLOADED_CHUNK]
            assert transform.complete is False


def test_chat_stream_to_the_byte() -> None:
    transform = shim.EventTransform(shim.ChatStreamEncoder(REPLY))
    lines = [
        b'{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}]}',
        b'{"content":"Hel"},"logprobs":null,"finish_reason":null}]}',
        b'{"content":"l\\u00f6 \\u4e16\\ud83d\\ude00"},"logprobs":null,"finish_reason":null}]}',
        b'{},"logprobs":null,"finish_reason":"stop"}]}',
    ]
    head = (
        b'data: {"id":"chatcmpl-msg_01","object":"chat.completion.chunk","created":7,'
        b'"model":"claude-opus-5-5","service_tier":"default","system_fingerprint":"claude_shim",'
        b'"choices":[{"index":0,"delta":'
    )
    expected = b"".join(head + line + b"\n\n" for line in lines) + b"data: [DONE]\n\n"
    assert transform.feed(sse(*TEXT_EVENTS)) == expected


def test_chat_stream_escapes_line_separators() -> None:
    """Clients that split lines of text would break at them."""
    transform = shim.EventTransform(shim.ChatStreamEncoder(REPLY))
    transform.feed(sse(message_start(), block_start(0, type="text", text="")))
    made = transform.feed(sse(text_delta(0, "a\u2028b\u0085c")))
    assert b'"content":"a\\u2028b\\u0085c"' in made
    assert made.isascii()


AFTER_THE_END = [
    case("a [DONE] of upstream (S3-B12)", b"data: [DONE]\n\n"),
    case("an error", sse(OVERLOADED)),
    case("a second stop", sse(MESSAGE_STOP)),
    case("garbage", b"\xff\xff data\n\n"),
]


@pytest.mark.parametrize("rest", AFTER_THE_END)
def test_chat_stream_ends_once(rest: bytes) -> None:
    raw = sse(*TEXT_EVENTS)
    expected = [
        ROLE,
        delta(content="Hel"),
        delta(content="l\u00f6 \u4e16\U0001f600"),
        finish("stop"),
        "[DONE]",
    ]
    together, apart = (shim.EventTransform(shim.ChatStreamEncoder(REPLY)) for _ in range(2))
    assert chunks(together.feed(raw + rest) + together.end()) == expected
    assert chunks(apart.feed(raw) + apart.feed(rest) + apart.end()) == expected


def test_chat_stream_has_no_text_after_its_end_although_its_block_is_open() -> None:
    transform = shim.EventTransform(shim.ChatStreamEncoder(REPLY))
    transform.feed(sse(message_start(), block_start(0, type="text", text="")))
    end = sse(message_delta("end_turn"), MESSAGE_STOP)
    assert chunks(transform.feed(end + sse(text_delta(0, "late")))) == [finish("stop"), "[DONE]"]


def server_error(message: str, code: Optional[str] = None) -> JSON:
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return {"error": error}


BROKEN = [
    case(
        "an event that is no JSON (S3-B20, S4-B23)",
        b"event: content_block_delta\ndata: {oops\n\n",
        server_error("upstream sent an event that is not JSON"),
    ),
    case(
        "an event that is no UTF-8",
        sse(text_delta(0, "x")).replace(b"x", b"\xff"),
        server_error("upstream sent an event that is not JSON"),
    ),
    case(
        "an error of a kind that nobody knows",
        sse({"type": "error", "error": {"type": "moon_error", "message": "Eclipse"}}),
        server_error("Eclipse"),
    ),
    case(
        "an error of the rate limit",
        sse({"type": "error", "error": {"type": "rate_limit_error", "message": "Slow down"}}),
        {
            "error": {
                "message": "Slow down",
                "type": "rate_limit_error",
                "param": None,
                "code": "rate_limit_exceeded",
            }
        },
    ),
    case(
        "an error without anything",
        sse({"type": "error"}),
        server_error("upstream answered with status 500"),
    ),
]


@pytest.mark.parametrize(("raw", "expected"), BROKEN)
def test_chat_stream_broken_in_the_middle(raw: bytes, expected: JSON) -> None:
    transform = shim.EventTransform(shim.ChatStreamEncoder(REPLY))
    made = transform.feed(sse(*TEXT_EVENTS[:4]) + raw + sse(*TEXT_EVENTS[4:])) + transform.end()
    assert chunks(made) == [ROLE, delta(content="Hel"), expected]
    assert transform.complete is False


def test_chat_stream_that_ends_before_it_began_is_an_error() -> None:
    transform = shim.EventTransform(shim.ChatStreamEncoder(REPLY))
    made = chunks(transform.feed(sse(MESSAGE_STOP)) + transform.end())
    assert made == [server_error("upstream ended an answer that had not begun")]


def test_chat_stream_timeout_is_told() -> None:
    transform = shim.EventTransform(shim.ChatStreamEncoder(REPLY))
    made = transform.feed(sse(*TEXT_EVENTS[:4]))
    made += transform.end(shim.UpstreamTimeoutError("upstream was silent for 300 s"))
    silent = server_error("upstream was silent for 300 s", "timeout")
    assert chunks(made) == [ROLE, delta(content="Hel"), silent]


@pytest.mark.parametrize("size", [2 << 20, 65536])
def test_chat_stream_line_of_more_than_a_megabyte(size: int) -> None:
    """S3-B11: a scanner's limit of one megabyte ended the answer."""
    text = "xxx\u00e9" * 300_000
    transform = shim.EventTransform(shim.ChatStreamEncoder(REPLY))
    raw = sse(message_start(), block_start(0, type="text", text=""), text_delta(0, text))
    made = b"".join(transform.feed(raw[i : i + size]) for i in range(0, len(raw), size))
    assert chunks(made) == [ROLE, delta(content=text)]


@pytest.mark.parametrize(
    ("block", "differences", "takes"),
    [
        case("text", text_of(""), {}, b"text_delta"),
        case("a block that is not known", {"type": "connector_text", "text": ""}, {}, b""),
        case("thinking", {"type": "thinking", "thinking": ""}, {}, b"thinking_delta"),
        case("a call", {"type": "tool_use", "name": "f", "input": {}}, {}, b"input_json_delta"),
        case("a call of the server's", {**SERVER_CALL, "input": {}}, {}, b""),
        case(
            "a call in free text",
            {"type": "tool_use", "name": "f", "input": {}},
            {"custom_tools": frozenset({"f"})},
            b"",
        ),
        case("text with citations", text_of(""), {"annotated": True}, b""),
        case("text that may have a fence", text_of(""), {"json_object": True}, b""),
    ],
)
def test_chat_stream_splices_where_nothing_counts_the_characters(
    block: JSON, differences: JSON, takes: bytes
) -> None:
    """The fast path, which the chunks above do not show."""
    encoder = shim.ChatStreamEncoder(REPLY._replace(**differences))
    seen = [encoder.takes]
    for event in (message_start(), block_start(0, **block), block_stop(0)):
        encoder.feed(event)
        seen.append(encoder.takes)
    assert seen == [b"", b"", takes, b""]


def test_chat_stream_heartbeat_is_a_comment() -> None:
    """An event without data breaks OpenAI's SDKs; a comment does not."""
    assert shim.ChatStreamEncoder.heartbeat == b": keep-alive\n\n"


def test_chat_stream_tells_calls_and_thinking_to_the_memory() -> None:
    told: List[Any] = []
    encoder = shim.ChatStreamEncoder(REPLY, lambda ids, blocks: told.append((ids, blocks)))
    transform = shim.EventTransform(encoder)
    transform.feed(
        sse(
            message_start(),
            block_start(0, type="thinking", thinking="", signature=""),
            block_delta(0, type="thinking_delta", thinking="Hm."),
            block_delta(0, type="signature_delta", signature="sig"),
            block_stop(0),
            block_start(1, type="redacted_thinking", data="Emw"),
            block_stop(1),
            block_start(2, type="server_tool_use", id="s1", name="web_search", input={}),
            block_stop(2),
            block_start(3, type="tool_use", id="t1", name="f", input={}),
            block_stop(3),
            block_start(4, type="tool_use", id="t2", name="f", input={}),
            block_stop(4),
            message_delta("tool_use"),
        )
    )
    assert told == []
    transform.feed(sse(MESSAGE_STOP))
    assert told == [(["t1", "t2"], [THOUGHT, HIDDEN])]


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_chat_stream_leaves_its_events_alone(playbook: Playbook) -> None:
    before = json.dumps(playbook.events())
    encoder = playbook.encoder(playbook.reply)
    made = b"".join(encoder.feed(event) for event in playbook.events())
    assert chunks(made) == playbook.chunks()
    assert json.dumps(playbook.events()) == before


# --- (f) legacy completions

PROMPTS = [
    case("a string", {"prompt": "Once"}, ["Once"]),
    case("a list of strings", {"prompt": ["Once", "Twice"]}, ["Once", "Twice"]),
]
BAD_PROMPTS = [
    case("none", {}, "prompt"),
    case("null", {"prompt": None}, "prompt"),
    case("an empty list", {"prompt": []}, "prompt"),
    case("an empty string", {"prompt": ""}, "prompt"),
    case("tokens", {"prompt": [1, 2]}, "prompt"),
    case("lists of tokens", {"prompt": [[1, 2]]}, "prompt"),
    case("an object", {"prompt": {}}, "prompt"),
    case("a suffix", {"prompt": "x", "suffix": "y"}, "suffix"),
    case("an echo", {"prompt": "x", "echo": True}, "echo"),
    case("more choices than are shown", {"prompt": "x", "best_of": 3, "n": 2}, "best_of"),
]


@pytest.mark.parametrize(("body", "expected"), PROMPTS)
def test_completion_prompts(body: JSON, expected: List[str]) -> None:
    assert shim.completion_prompts(body) == expected


@pytest.mark.parametrize(("body", "param"), BAD_PROMPTS)
def test_completion_refused(body: JSON, param: str) -> None:
    with pytest.raises(shim.RequestError) as caught:
        [requested(shim.chat_from_completion(body, p)) for p in shim.completion_prompts(body)]
    assert (caught.value.status, caught.value.param) == (400, param)


def test_completion_request() -> None:
    body = {
        "model": "opus",
        "prompt": ["Once", "Twice"],
        "max_tokens": 16,
        "temperature": 0,
        "stop": "\n\n###",
        "n": 2,
        "best_of": 2,
        "echo": False,
        "suffix": None,
        "logprobs": 5,
        "user": "u-1",
    }
    before = json.dumps(body)
    draft = shim.messages_request_from_chat(shim.chat_from_completion(body, "Twice"), OPUS)
    assert draft.finished() == wanted(
        user("Twice"),
        max_tokens=16,
        temperature=0,
        stop_sequences=["\n\n###"],
        metadata={"user_id": "u-1"},
    )
    assert (draft.n, list(draft.ignored)) == (2, ["logprobs"])
    assert json.dumps(body) == before


def test_completion_answer() -> None:
    messages = [
        chat_message_of(THOUGHT, says("Hell\u00f6"), says("!")),
        chat_message_of(stop_reason="refusal", id="msg_02"),
        chat_message_of(says("cut"), stop_reason="max_tokens", id="msg_03"),
    ]
    assert shim.completion_from_messages(messages, REPLY) == {
        "id": "cmpl-msg_01",
        "object": "text_completion",
        "created": 7,
        "model": "claude-opus-5-5",
        "choices": [
            {"index": 0, "text": "Hell\u00f6!", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "content_filter"},
            {"index": 2, "text": "cut", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": usage(75, 45),
        "service_tier": "default",
        "system_fingerprint": "claude_shim",
    }


# ----------------------------------------------------------------------
# 7. Responses <-> Messages
# ----------------------------------------------------------------------

KEY = b"k" * 32


def envelope(content: JSON, key: bytes = KEY, version: str = "csh1.") -> str:
    """An envelope, made with the standard library alone."""
    packed = json.dumps(content, separators=(",", ":")).encode()
    text = version + base64.urlsafe_b64encode(packed).decode()
    return f"{text}.{hmac.new(key, text.encode(), hashlib.sha256).hexdigest()}"


def thought(thinking: str = "hm", signature: str = "EqQB") -> JSON:
    return {"type": "thinking", "thinking": thinking, "signature": signature}


HIDDEN_THOUGHT: JSON = {"type": "redacted_thinking", "data": "EmwK"}
SEALED_THOUGHT = envelope({"thinking": [thought()]})


def test_envelope_is_opened_by_its_own_key_only() -> None:
    made = shim.sealed({"thinking": [thought("\u4e16")]}, KEY)
    assert made == envelope({"thinking": [thought("\u4e16")]})
    assert shim.unsealed(made, KEY) == {"thinking": [thought("\u4e16")]}
    assert shim.unsealed(made, b"another key") == {}


NOT_OURS = [
    case("nothing", None),
    case("no text", 7),
    case("empty", ""),
    case("OpenAI's", "gAAAAABo" + "x" * 100),
    case("half of it", SEALED_THOUGHT[:40]),
    case("without the seal", SEALED_THOUGHT.rpartition(".")[0]),
    case("an empty seal", SEALED_THOUGHT.rpartition(".")[0] + "."),
    case("another version, well sealed", envelope({"thinking": [thought()]}, version="csh2.")),
    case("a seal that is no ASCII", SEALED_THOUGHT[:-1] + "\u00e9"),
    case("half a surrogate", SEALED_THOUGHT[:-1] + "\ud83d"),
]


@pytest.mark.parametrize("text", NOT_OURS)
def test_envelope_that_is_not_ours_holds_nothing(text: Any) -> None:
    assert shim.unsealed(text, KEY) == {}


def test_envelope_with_any_character_changed_holds_nothing() -> None:
    for position, character in enumerate(SEALED_THOUGHT):
        other = "A" if character != "A" else "B"
        changed = SEALED_THOUGHT[:position] + other + SEALED_THOUGHT[position + 1 :]
        assert shim.unsealed(changed, KEY) == {}


# --- (a) requests


def asks(*items: Any, **fields: Any) -> JSON:
    """A Responses body."""
    return {"model": "opus", "input": list(items), **fields}


def drafted(body: JSON, **known: Any) -> shim.ResponsesDraft:
    return shim.messages_request_from_responses(body, OPUS, shim.Known(**{"key": KEY, **known}))


def message(text: Any, role: str = "user", **more: Any) -> JSON:
    return {"type": "message", "role": role, "content": text, **more}


def out_text(text: str) -> JSON:
    return {"type": "output_text", "text": text, "annotations": []}


def in_call(id: str, arguments: Any = "{}", name: str = "f", **more: Any) -> JSON:
    item = {"type": "function_call", "call_id": id, "name": name, "arguments": arguments}
    return {**item, "id": f"fc_{id}", "status": "completed", **more}


def in_output(id: str, output: Any = "18C", kind: str = "function_call") -> JSON:
    return {"type": f"{kind}_output", "call_id": id, "output": output}


def in_reasoning(*blocks: JSON, **more: Any) -> JSON:
    sealed = {"encrypted_content": envelope({"thinking": list(blocks)})} if blocks else {}
    return {"type": "reasoning", "id": "rs_1", "summary": [], **sealed, **more}


def flat(name: str = "f", **more: Any) -> JSON:
    """One of a Responses body's `tools`."""
    return {"type": "function", "name": name, **more}


GREETING = message("hi")
LARK = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
FREE_TEXT: JSON = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
WEB = {"type": "web_search_20250305", "name": "web_search"}

ITEMS = [
    case("a string", {"model": "opus", "input": "hi"}, wanted(user("hi"))),
    case("a message", asks(GREETING), wanted(user("hi"))),
    case(
        "a message without type, by the role alone",
        asks({"role": "user", "content": "hi"}),
        wanted(user("hi")),
    ),
    case(
        "parts of Responses and of Chat Completions side by side",
        asks(
            message(
                [
                    {"type": "input_text", "text": "a"},
                    {"type": "text", "text": "b"},
                    {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"},
                    {
                        "type": "input_image",
                        "image_url": {"url": "https://e.org/i"},
                        "detail": "high",
                    },
                    {"type": "image_url", "image_url": {"url": f"data:image/jpg;base64,{JPEG}"}},
                    {"type": "input_file", "file_data": PDF, "filename": "a.pdf"},
                    {"type": "input_file", "file_url": "https://e.org/b.pdf"},
                ]
            )
        ),
        wanted(
            user(
                "a",
                "b",
                image("image/png", PNG),
                {"type": "image", "source": {"type": "url", "url": "https://e.org/i"}},
                image("image/jpeg", JPEG),
                {
                    "type": "document",
                    "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
                    "title": "a.pdf",
                },
                {"type": "document", "source": {"type": "url", "url": "https://e.org/b.pdf"}},
            )
        ),
    ),
    case(
        "instructions, developer and system messages are system until somebody spoke",
        asks(message("b", "developer"), message("c", "system"), GREETING, instructions="a"),
        wanted(user("hi"), system=[says("a"), says("b"), says("c")]),
    ),
    case(
        "a developer message in the middle keeps its place",
        asks(GREETING, message("b", "developer")),
        wanted(user("hi"), {"role": "system", "content": [says("b")]}),
    ),
    case(
        "an answer in its own shape, without type as Vercel sends it, and as plain text",
        asks(
            GREETING,
            message([out_text("a")], "assistant", id="msg_1", phase="commentary"),
            {"role": "assistant", "content": [out_text("b")], "id": "msg_2"},
            {"role": "assistant", "content": "c"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "d"}]},
            GREETING,
        ),
        wanted(user("hi"), assistant("a", "b", "c", "d"), user("hi")),
    ),
    case(
        "reasoning and two calls are one turn, their results the next (3; Codex's order)",
        asks(
            GREETING,
            in_reasoning(thought(), content=None),
            in_call("t1", '{"a":1}'),
            in_call("t2"),
            in_output("t2", "two"),
            in_output("t1", "one"),
        ),
        wanted(
            user("hi"),
            assistant(thought(), use("t1", a=1), use("t2")),
            user(result("t1", "one"), result("t2", "two")),
        ),
    ),
    case(
        "several thoughts, one of them redacted, in their places",
        asks(
            GREETING,
            in_reasoning(thought("a")),
            message([out_text("b")], "assistant"),
            in_reasoning(HIDDEN_THOUGHT, thought("c")),
            in_call("t1"),
            in_output("t1"),
        ),
        wanted(
            user("hi"),
            assistant(thought("a"), "b", HIDDEN_THOUGHT, thought("c"), use("t1")),
            user(result("t1")),
        ),
    ),
    case(
        "reasoning without an envelope says nothing",
        asks(GREETING, in_reasoning(summary=[{"type": "summary_text", "text": "s"}]), GREETING),
        wanted(user("hi", "hi")),
    ),
    case(
        "thinking that nothing follows goes, as no turn may end in it",
        asks(GREETING, message("a", "assistant"), in_reasoning(thought()), GREETING),
        wanted(user("hi"), assistant("a"), user("hi")),
    ),
    case(
        "a result with an image, as Codex sends it for MCP",
        asks(
            GREETING,
            in_call("t1"),
            in_output(
                "t1",
                [
                    {"type": "input_text", "text": "see"},
                    {
                        "type": "input_image",
                        "image_url": f"data:image/png;base64,{PNG}",
                        "detail": "high",
                    },
                ],
            ),
        ),
        wanted(
            user("hi"),
            assistant(use("t1")),
            user(result("t1", [says("see"), image("image/png", PNG)])),
        ),
    ),
    case(
        "no arguments, arguments that are no JSON, an id that Anthropic refuses",
        asks(
            GREETING, in_call("a.b", ""), in_call("t2", "{"), in_output("a.b", ""), in_output("t2")
        ),
        wanted(
            user("hi"),
            assistant(use("a_b_2e7336dc"), use("t2", _raw="{")),
            user({"type": "tool_result", "tool_use_id": "a_b_2e7336dc"}, result("t2")),
        ),
    ),
    case(
        "a custom call and its output",
        asks(
            GREETING,
            {"type": "custom_tool_call", "call_id": "t1", "name": "p", "input": "*** Begin"},
            in_output("t1", "Done", "custom_tool_call"),
        ),
        wanted(
            user("hi"), assistant(use("t1", "p", input="*** Begin")), user(result("t1", "Done"))
        ),
    ),
    case(
        "a call without tools keeps the name that its namespace made (Codex's local compaction)",
        asks(GREETING, in_call("t1", namespace="ns", name="g"), in_output("t1"), tools=[]),
        wanted(user("hi"), assistant(use("t1", "ns__g")), user(result("t1"))),
    ),
    case(
        "a search for tools: a call, its result, and the tools found",
        asks(
            GREETING,
            {
                "type": "tool_search_call",
                "call_id": "t1",
                "execution": "client",
                "arguments": {"query": "k"},
            },
            {"type": "tool_search_output", "call_id": "t1", "tools": [flat(defer_loading=True)]},
        ),
        wanted(
            user("hi"),
            assistant(use("t1", "tool_search", query="k")),
            user(result("t1", '[{"type":"function","name":"f","defer_loading":true}]')),
            tools=[tool("f")],
        ),
    ),
    case(
        "tools in an item and none above (Codex for its newest models)",
        asks({"type": "additional_tools", "role": "developer", "tools": [flat()]}, GREETING),
        wanted(user("hi"), tools=[tool("f")]),
    ),
    case(
        "a summary of what was said before",
        asks({"type": "compaction", "encrypted_content": envelope({"summary": "All."})}, GREETING),
        wanted(user("<conversation-summary>\nAll.\n</conversation-summary>", "hi")),
    ),
    case(
        "a change of settings in the middle",
        asks(
            GREETING,
            {
                "type": "configuration_update",
                "reasoning": {"effort": "low"},
                "text": {"verbosity": "medium"},
            },
        ),
        wanted(
            user("hi"),
            output_config={"effort": "low"},
            thinking={"type": "adaptive", "display": "omitted"},
        ),
    ),
    case(
        "a call that was not answered, and a result that nobody asks for",
        asks(GREETING, in_call("t1"), GREETING, in_output("t9", "stray")),
        wanted(user("hi"), assistant(use("t1")), user(no_result("t1"), "hi", "stray")),
    ),
]


@pytest.mark.parametrize(("body", "expected"), ITEMS)
def test_responses_items(body: JSON, expected: JSON) -> None:
    before = json.dumps(body)
    draft = drafted(body)
    request = draft.finished()
    assert request == expected
    assert list(draft.ignored) == []
    assert faults(shim.adapted(request, shim.known_model("claude-haiku-4-5")).request) == []
    assert json.dumps(body) == before


SUMMARISED = wanted(user("hi", shim.SUMMARISE))


def test_responses_compaction_trigger_asks_for_a_summary() -> None:
    body = asks(
        GREETING,
        {"type": "compaction_trigger"},
        tools=[flat()],
        tool_choice="required",
        text={"format": {"type": "json_object"}},
    )
    draft = drafted(body)
    assert draft.compacts
    expected = {**SUMMARISED, "tools": [tool("f")], "tool_choice": {"type": "none"}}
    assert (draft.finished(), draft.json_object) == (expected, False)


FUNCTION: JSON = flat(
    "get.weather",
    description="d",
    parameters={"type": "object", "properties": {"a": {"type": "string"}}},
    strict=False,
    output_schema={},
    allowed_callers=["direct"],
)

RESPONSE_TOOLS = [
    case(
        "functions: strict only when it is said, no fields that are OpenAI's alone",
        [FUNCTION, flat("g", parameters=None, strict=None), flat("h", strict=True)],
        [
            {
                "name": "get_weather_f65d4328",
                "description": "d",
                "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}},
            },
            tool("g"),
            {
                **tool("h", strict=True),
                "input_schema": {**NO_PARAMETERS, "additionalProperties": False},
            },
        ],
        {"get_weather_f65d4328": ("function_call", "get.weather", "")},
    ),
    case(
        "a tool of free text with a grammar",
        [{"type": "custom", "name": "p", "description": "Patch.", "format": LARK}],
        [
            {
                "name": "p",
                "description": "Patch.\n\nThe input must fit this lark grammar:\nstart: /.+/",
                "input_schema": FREE_TEXT,
            }
        ],
        {"p": ("custom_tool_call", "p", "")},
    ),
    case(
        "a namespace of functions and tools of free text",
        [
            {
                "type": "namespace",
                "name": "ns",
                "description": "d",
                "tools": [flat("g"), {"type": "custom", "name": "exec"}],
            }
        ],
        [
            tool("ns__g"),
            {"name": "ns__exec", "description": "ns__exec", "input_schema": FREE_TEXT},
        ],
        {"ns__g": ("function_call", "g", "ns"), "ns__exec": ("custom_tool_call", "exec", "ns")},
    ),
    case(
        "a plain tool has its own name before one that a namespace makes",
        [
            {"type": "namespace", "name": "ns", "tools": [flat("g")]},
            flat("ns__g"),
        ],
        [tool("ns__g"), tool("ns_g_702b368e")],
        {"ns__g": ("function_call", "ns__g", ""), "ns_g_702b368e": ("function_call", "g", "ns")},
    ),
    case(
        "the same namespace twice is the same tool",
        [{"type": "namespace", "name": "ns", "tools": [flat("g"), flat("g")]}],
        [tool("ns__g")],
        {"ns__g": ("function_call", "g", "ns")},
    ),
    case(
        "a name that is too long comes back whole",
        [{"type": "namespace", "name": "n" * 100, "tools": [flat("g" * 64)]}],
        [tool("n" * 100 + "__" + "g" * 17 + "_1ee48524")],
        {
            "n" * 100 + "__" + "g" * 17 + "_1ee48524": ("function_call", "g" * 64, "n" * 100),
        },
    ),
    case(
        "a search for tools that the client runs",
        [{"type": "tool_search", "execution": "client", "description": "d", "parameters": {}}],
        [tool("tool_search", description="d")],
        {"tool_search": ("tool_search_call", "tool_search", "")},
    ),
    case(
        "web search with place and domains",
        [
            {
                "type": "web_search_preview_2025_03_11",
                "user_location": {"type": "approximate", "city": "Rome", "country": None},
                "filters": {"allowed_domains": ["e.org"]},
                "search_context_size": "medium",
            }
        ],
        [
            {
                **WEB,
                "user_location": {"type": "approximate", "city": "Rome"},
                "allowed_domains": ["e.org"],
            }
        ],
        {},
    ),
    case(
        "tools of the other dialects (LibreChat, #21)",
        [function("a"), {"name": "b", "input_schema": NO_PARAMETERS}, {**WEB, "max_uses": 5}],
        [tool("a"), tool("b"), {**WEB, "max_uses": 5}],
        {"a": ("function_call", "a", ""), "b": ("function_call", "b", "")},
    ),
]


@pytest.mark.parametrize(("given", "expected", "called_as"), RESPONSE_TOOLS)
def test_responses_tools(given: List[JSON], expected: List[JSON], called_as: JSON) -> None:
    draft = drafted(asks(GREETING, tools=given))
    request = draft.finished()
    assert request["tools"] == expected
    told = {name: tuple(draft.called_as[name]) for name in called_as}
    assert told == called_as
    assert list(draft.ignored) == []
    assert faults(request) == []


def test_responses_history_calls_a_tool_by_the_name_that_it_has_now() -> None:
    space = {"type": "namespace", "name": "ns", "tools": [flat("g")]}
    items = [in_call("t1", name="g", namespace="ns"), in_call("t2", name="ns__g")]
    draft = drafted(asks(GREETING, *items, tools=[space, flat("ns__g")]))
    assert draft.finished()["messages"][1] == assistant(
        use("t1", "ns_g_702b368e"), use("t2", "ns__g")
    )


TWO_TOOLS = [flat("f"), {"type": "namespace", "name": "ns", "tools": [flat("g")]}]
RESPONSE_CHOICES = [
    case("none", "none", {"type": "none"}),
    case("required", "required", {"type": "any"}),
    case("a function", {"type": "function", "name": "f"}, {"type": "tool", "name": "f"}),
    case(
        "one of a namespace",
        {"type": "function", "name": "g", "namespace": "ns"},
        {"type": "tool", "name": "ns__g"},
    ),
    case("nested", {"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
    case("Anthropic's", {"type": "any"}, {"type": "any"}),
    case("a search", {"type": "web_search_preview"}, {"type": "tool", "name": "web_search"}),
    case(
        "some of them",
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
        {"type": "any"},
    ),
]


@pytest.mark.parametrize(("choice", "expected"), RESPONSE_CHOICES)
def test_responses_tool_choice(choice: Any, expected: JSON) -> None:
    tools = [*TWO_TOOLS, {"type": "web_search"}]
    request = drafted(asks(GREETING, tools=tools, tool_choice=choice)).finished()
    assert request["tool_choice"] == expected
    assert len(request["tools"]) == (1 if "mode" in choice else 3)


RESPONSE_FIELDS = [
    case("max_output_tokens", {"max_output_tokens": 99}, {"max_tokens": 99}),
    case("sampling", {"temperature": 2, "top_p": 0.5}, {"temperature": 1, "top_p": 0.5}),
    case(
        "one call at a time",
        {"tools": [flat()], "parallel_tool_calls": False},
        {
            "tools": [tool()],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
    ),
    case(
        "effort and a summary",
        {"reasoning": {"effort": "xhigh", "summary": "auto"}},
        {
            "output_config": {"effort": "xhigh"},
            "thinking": {"type": "adaptive", "display": "summarized"},
        },
    ),
    case(
        "effort alone shows no thoughts",
        {"reasoning": {"effort": "minimal", "summary": None}},
        {
            "output_config": {"effort": "low"},
            "thinking": {"type": "adaptive", "display": "omitted"},
        },
    ),
    case(
        "a summary alone (Codex for a model it does not know)",
        {"reasoning": {"summary": "auto"}},
        {"thinking": {"type": "adaptive", "display": "summarized"}},
    ),
    case("no effort", {"reasoning": {"effort": "none"}}, {"thinking": {"type": "disabled"}}),
    case("nothing said of reasoning", {"reasoning": {}, "text": {}}, {}),
    case(
        "a schema, flat",
        {
            "text": {
                "format": {
                    "type": "json_schema",
                    "name": "n",
                    "strict": True,
                    "schema": {"type": "object", "properties": {}},
                }
            }
        },
        {
            "output_config": {
                "format": {
                    "type": "json_schema",
                    "schema": {**NO_PARAMETERS, "additionalProperties": False},
                }
            }
        },
    ),
    case("a user", {"safety_identifier": "u1", "user": "u2"}, {"metadata": {"user_id": "u1"}}),
    case(
        "what is said again or asks for nothing",
        {
            "metadata": {"a": "b"},
            "include": ["reasoning.encrypted_content"],
            "truncation": "disabled",
            "store": False,
            "stream": True,
            "stream_options": {"include_obfuscation": False},
            "background": False,
            "conversation": None,
            "service_tier": "auto",
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
        },
        {},
    ),
]


@pytest.mark.parametrize(("fields", "expected"), RESPONSE_FIELDS)
def test_responses_fields(fields: JSON, expected: JSON) -> None:
    draft = drafted(asks(GREETING, **fields))
    assert draft.finished() == wanted(user("hi"), **expected)
    assert list(draft.ignored) == []


SCHEMA_FORMAT = {"type": "json_schema", "name": "n", "schema": NO_PARAMETERS}

RESPONSES_UNHEARD = [
    case("a field without effect", {"max_tool_calls": 3}, ["max_tool_calls"]),
    case(
        "a field that nobody knows", {"client_metadata": {"a": 1}, "x": 1}, ["client_metadata", "x"]
    ),
    case("truncation", {"truncation": "auto"}, ["truncation"]),
    case("verbosity", {"text": {"verbosity": "low"}}, ["text.verbosity"]),
    case("mode", {"reasoning": {"mode": "pro"}}, ["reasoning.mode"]),
    case(
        "what to include",
        {"include": ["file_search_call.results"]},
        ["include.file_search_call.results"],
    ),
    case(
        "hosted tools",
        {"tools": [{"type": "mcp"}, {"type": "local_shell"}]},
        ["tools.local_shell", "tools.mcp"],
    ),
    case(
        "a search without the web (Codex's default)",
        {"tools": [{"type": "web_search", "external_web_access": False}]},
        ["tools.web_search"],
    ),
    case(
        "a search for tools by OpenAI", {"tools": [{"type": "tool_search"}]}, ["tools.tool_search"]
    ),
    case(
        "calls of hosted tools",
        {"input": [GREETING, {"type": "web_search_call", "id": "ws_1"}, {"type": "mcp_call"}]},
        ["input.mcp_call", "input.web_search_call"],
    ),
    case(
        "a search for tools that the client did not run",
        {"input": [GREETING, {"type": "tool_search_call", "call_id": None, "arguments": {}}]},
        ["input.tool_search_call"],
    ),
    case(
        "thinking in a foreign envelope",
        {"input": [GREETING, {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAAB"}]},
        ["input.reasoning.encrypted_content"],
    ),
    case(
        "thinking in an envelope that was tampered with",
        {"input": [GREETING, in_reasoning(encrypted_content=SEALED_THOUGHT[:-1] + "x")]},
        ["input.reasoning.encrypted_content"],
    ),
    case(
        "a foreign summary",
        {"input": [GREETING, {"type": "compaction", "encrypted_content": "gAAAAAB"}]},
        ["input.compaction"],
    ),
    case(
        "reasoning that was forgotten",
        {"input": [GREETING, {"type": "item_reference", "id": "rs_gone"}]},
        ["input.item_reference"],
    ),
    case(
        "a schema beside a forced tool, which wins (instructor)",
        {"tools": [flat()], "tool_choice": "required", "text": {"format": SCHEMA_FORMAT}},
        ["text.format"],
    ),
    case(
        "keywords of a schema",
        {
            "text": {
                "format": {**SCHEMA_FORMAT, "schema": {"type": "object", "maxProperties": 3}},
            }
        },
        ["text.format.maxProperties"],
    ),
]


@pytest.mark.parametrize(("fields", "expected"), RESPONSES_UNHEARD)
def test_responses_ignored_fields_are_named(fields: JSON, expected: List[str]) -> None:
    draft = drafted({**asks(GREETING), **fields})
    assert sorted(draft.ignored) == expected
    assert faults(draft.finished()) == []
    assert b"gAAAAAB" not in shim.dumps(draft.finished())


RESPONSES_REFUSED = [
    case("nothing", {"input": None}, "input", "you must give input"),
    case("input of the wrong type", {"input": 7}, "input", "expected a list"),
    case("an item that is none", {"input": ["hi"]}, "input.0", "expected an object"),
    case("an unknown role", {"input": [{"role": "critic"}]}, "input.0.role", "unknown role"),
    case("audio", {"input": [message([{"type": "input_audio"}])]}, "input.0.content.0", "audio"),
    case(
        "a call without id",
        {"input": [{"type": "function_call", "name": "f"}]},
        "input.0.call_id",
        "string",
    ),
    case(
        "a call without name",
        {"input": [{"type": "function_call", "call_id": "t"}]},
        "input.0.name",
        "string",
    ),
    case("an item that says nothing", {"input": [{}]}, "input.0.id", "string"),
    case("in the background", {"background": True}, "background", "stream instead"),
    case("a conversation", {"conversation": "conv_1"}, "conversation", "previous_response_id"),
    case("a stored prompt", {"prompt": {"id": "pmpt_1"}}, "prompt", "stores no prompts"),
    case(
        "an unknown response",
        {"previous_response_id": "resp_9"},
        "previous_response_id",
        "Previous response with id 'resp_9' not found.",
    ),
    case(
        "an unknown item", {"input": [{"id": "msg_9"}]}, "input", "Item with id 'msg_9' not found."
    ),
    case("a tool that is no object", {"tools": [7]}, "tools.0", "expected an object"),
    case("a tool without name", {"tools": [{"type": "function"}]}, "tools.0.name", "string"),
    case(
        "a forced tool that Claude has not",
        {"tools": [flat()], "tool_choice": {"type": "file_search"}},
        "tool_choice.type",
        "no tool of type 'file_search'",
    ),
    case(
        "a forced tool that is not there",
        {"tools": [flat()], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice.name",
        "no tool 'g'",
    ),
    case(
        "an unknown format",
        {"text": {"format": {"type": "yaml"}}},
        "text.format.type",
        "json_schema",
    ),
    case(
        "a format without schema",
        {"text": {"format": {"type": "json_schema"}}},
        "text.format.schema",
        "object",
    ),
    case("a budget of none", {"max_output_tokens": 0}, "max_output_tokens", "over zero"),
]


@pytest.mark.parametrize(("fields", "param", "reason"), RESPONSES_REFUSED)
def test_responses_refused(fields: JSON, param: str, reason: str) -> None:
    with pytest.raises(shim.RequestError) as caught:
        drafted({**asks(GREETING), **fields})
    assert caught.value.param == param
    assert reason in caught.value.message


RICH_RESPONSES: JSON = {
    "model": OPUS,
    "instructions": "a",
    "input": [
        message([{"type": "input_text", "text": "a"}], "developer"),
        {"role": "user", "content": "hi"},
        message([{"type": "input_image", "image_url": f"data:;base64,{PNG}", "file_id": None}]),
        message([{"type": "input_file", "file_data": PDF, "filename": "a"}]),
        in_reasoning(thought()),
        message([out_text("b")], "assistant"),
        in_call("t1", '{"a":1}', namespace="ns", name="g"),
        {"type": "custom_tool_call", "call_id": "t2", "name": "p", "input": "x"},
        in_output("t1", [{"type": "input_text", "text": "c"}]),
        in_output("t2", "d", "custom_tool_call"),
        {"type": "tool_search_call", "call_id": "t3", "arguments": {"query": "k"}},
        {"type": "tool_search_output", "call_id": "t3", "tools": [flat("h")]},
        {"type": "additional_tools", "tools": [flat("i")]},
        {"type": "compaction", "encrypted_content": envelope({"summary": "s"})},
        {"type": "configuration_update", "reasoning": {"effort": "low"}, "text": {}},
        {"type": "item_reference", "id": "rs_9"},
        {"type": "compaction_trigger"},
    ],
    "tools": [
        flat(strict=True, parameters={"type": "object", "properties": {"a": {}}}),
        {"type": "custom", "name": "p", "format": LARK},
        {"type": "namespace", "name": "ns", "tools": [flat("g")]},
        {"type": "tool_search", "execution": "client", "description": "d", "parameters": {}},
        {"type": "web_search", "filters": {"allowed_domains": ["e.org"]}, "user_location": {}},
        {"type": "mcp", "server_label": "x"},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [flat()]},
    "reasoning": {"effort": "low", "summary": "auto", "context": "auto", "mode": "standard"},
    "text": {"format": {**SCHEMA_FORMAT}, "verbosity": "low"},
    "include": ["reasoning.encrypted_content"],
    "store": True,
    "truncation": "auto",
    "max_output_tokens": 9,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "client_metadata": {"a": 1},
    "metadata": {"a": "b"},
}


def test_responses_the_rich_request_is_taken() -> None:
    assert faults(drafted(RICH_RESPONSES).finished()) == []


@pytest.mark.parametrize("field", list(RICH_RESPONSES))
def test_responses_a_wrong_type_at_any_depth_is_refused_by_name_or_harmless(field: str) -> None:
    models = [shim.known_model(OPUS), shim.known_model("claude-haiku-4-5")]
    trouble = []
    for value in spoiled(RICH_RESPONSES[field]):
        body = {**RICH_RESPONSES, field: value}
        try:
            draft = drafted(body)
            request = draft.finished()
            found = [f for model in models for f in faults(shim.adapted(request, model).request)]
            trouble += [(value, fault) for fault in dict.fromkeys(found)]
            reply = shim.ResponsesReply.to(draft, "resp_7", lambda: 7)
            shim.response_from_message(chat_message_of(says("a"), use("t", "f")), reply)
        except shim.RequestError as error:
            if str(error.param).partition(".")[0] not in body:
                trouble.append((value, f"param {error.param}"))
        except Exception as error:
            trouble.append((value, repr(error)))
    assert len(trouble) == 0, trouble[:5]


def test_responses_reference_is_the_item_itself() -> None:
    kept = {"msg_1": message([out_text("a")], "assistant"), "rs_1": in_reasoning(thought())}
    items = [
        GREETING,
        {"type": "item_reference", "id": "msg_1"},
        {"type": None, "id": "rs_1"},
        in_call("t1"),
        in_output("t1"),
    ]
    draft = drafted(asks(*items), item=kept.get)
    expected = [user("hi"), assistant("a", thought(), use("t1")), user(result("t1"))]
    assert draft.finished()["messages"] == expected
    full_hi = message([{"type": "input_text", "text": "hi"}], status="completed")
    full_answer = {**kept["msg_1"], "status": "completed"}
    expected_items = [full_hi, full_answer, kept["rs_1"], in_call("t1"), in_output("t1")]
    assert draft.items == expected_items


def test_responses_previous_response_comes_before_the_input() -> None:
    before = {"resp_1": [GREETING, in_reasoning(thought()), in_call("t1")]}
    draft = drafted(asks(in_output("t1"), previous_response_id="resp_1"), history=before.get)
    expected = [user("hi"), assistant(thought(), use("t1")), user(result("t1"))]
    assert draft.finished()["messages"] == expected
    assert draft.items == [in_output("t1")]


def test_responses_previous_response_needs_no_input() -> None:
    body = {"model": "opus", "previous_response_id": "resp_1"}
    draft = drafted(body, history={"resp_1": [GREETING]}.get)
    assert draft.finished() == wanted(user("hi"))


def test_responses_remembers_thinking_that_a_client_left_out() -> None:
    """D5: the last resort, only for a turn that came without any."""
    items = [
        GREETING,
        message("a", "assistant"),
        in_call("t1"),
        in_output("t1"),
        in_reasoning(thought("own")),
        in_call("t2"),
        in_output("t2"),
    ]
    kept = {"t1": [thought("kept")], "t2": [thought("not this")]}
    draft = drafted(asks(*items), thinking=lambda call_id: kept.get(call_id, []))
    turns = draft.finished()["messages"]
    assert turns[1] == assistant(thought("kept"), "a", use("t1"))
    assert turns[3] == assistant(thought("own"), use("t2"))


# --- (b) answers: each event of upstream with the events that it makes


def event(type_: str, **fields: Any) -> JSON:
    return {"type": type_, **fields}


def of_item(id: str, type_: str, **fields: Any) -> JSON:
    """An event of an item; the number after the last underscore of its id is its place."""
    return event(f"response.{type_}", item_id=id, output_index=int(id[-1]), **fields)


def added(item: JSON) -> JSON:
    return event("response.output_item.added", output_index=int(item["id"][-1]), item=item)


def done(item: JSON) -> JSON:
    return event("response.output_item.done", output_index=int(item["id"][-1]), item=item)


RESPONSE: JSON = {
    "id": "resp_7",
    "object": "response",
    "created_at": 7,
    "status": "in_progress",
    "background": False,
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "model": "claude-opus-5-5",
    "output": [],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1,
    "truncation": "disabled",
    "usage": None,
    "user": None,
    "metadata": {},
}
RESPONSE_USAGE: JSON = {
    "input_tokens": 25,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 15,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 40,
}


def finished_by(*output: JSON, reason: Optional[str] = None) -> JSON:
    """The last event of an answer that is whole, or incomplete for a reason."""
    if reason:
        how = {"status": "incomplete", "incomplete_details": {"reason": reason}}
    else:
        how = {"status": "completed", "completed_at": 9}
    response = {**RESPONSE, **how, "output": list(output), "usage": RESPONSE_USAGE}
    return event(f"response.{response['status']}", response=response)


RESPONSE_START: Step = (
    message_start(),
    [
        event("response.created", response=RESPONSE),
        event("response.in_progress", response=RESPONSE),
    ],
)
RESPONSE_REPLY = shim.ResponsesReply(
    id="resp_7",
    created=7,
    model="claude-opus-5-5",
    key=KEY,
    called_as={
        "p": shim.CalledAs("custom_tool_call", "p"),
        "ns__g": shim.CalledAs("function_call", "g", "ns"),
        "tool_search": shim.CalledAs("tool_search_call", "tool_search"),
    },
    clock=lambda: 9,
)


def message_item(id: str, status: str, *content: JSON) -> JSON:
    item = {"id": id, "type": "message", "status": status}
    return {**item, "content": list(content), "role": "assistant"}


def text_part(text: str, *annotations: JSON) -> JSON:
    return {"type": "output_text", "annotations": list(annotations), "logprobs": [], "text": text}


def text_opened(id: str) -> List[JSON]:
    part = of_item(id, "content_part.added", content_index=0, part=text_part(""))
    return [added(message_item(id, "in_progress")), part]


def text_told(id: str, delta: str) -> JSON:
    return of_item(id, "output_text.delta", content_index=0, delta=delta, logprobs=[])


def part_closed(id: str, text: str, *annotations: JSON) -> List[JSON]:
    part = text_part(text, *annotations)
    return [
        of_item(id, "output_text.done", content_index=0, text=text, logprobs=[]),
        of_item(id, "content_part.done", content_index=0, part=part),
    ]


def text_closed(id: str, text: str, status: str = "completed") -> List[JSON]:
    return [*part_closed(id, text), done(message_item(id, status, text_part(text)))]


def function_item(id: str, status: str, call_id: str, arguments: str, **more: Any) -> JSON:
    item = {"id": id, "type": "function_call", "status": status, "arguments": arguments}
    return {**item, "call_id": call_id, "name": "f", **more}


def arguments_told(id: str, delta: str) -> JSON:
    return of_item(id, "function_call_arguments.delta", delta=delta)


def arguments_closed(id: str, arguments: str, item: JSON) -> List[JSON]:
    return [of_item(id, "function_call_arguments.done", arguments=arguments), done(item)]


def custom_item(id: str, status: str, text: str) -> JSON:
    item = {"id": id, "type": "custom_tool_call", "status": status, "input": text}
    return {**item, "call_id": "t1", "name": "p"}


def reasoning_item(id: str, summary: str = "", *sealed: JSON) -> JSON:
    parts = [{"type": "summary_text", "text": summary}] if summary else []
    item: JSON = {"id": id, "type": "reasoning", "summary": parts}
    return {**item, "encrypted_content": envelope({"thinking": list(sealed)})} if sealed else item


def summary_part(id: str, type_: str, text: str) -> JSON:
    part = {"type": "summary_text", "text": text}
    return of_item(id, f"reasoning_summary_part.{type_}", summary_index=0, part=part)


def summary_text(id: str, type_: str, **fields: str) -> JSON:
    return of_item(id, f"reasoning_summary_text.{type_}", summary_index=0, **fields)


def refusal_told(id: str, index: int, text: str) -> List[JSON]:
    place = {"content_index": index}
    part = {"type": "refusal", "refusal": text}
    return [
        of_item(id, "content_part.added", **place, part={**part, "refusal": ""}),
        of_item(id, "refusal.delta", **place, delta=text),
        of_item(id, "refusal.done", **place, refusal=text),
        of_item(id, "content_part.done", **place, part=part),
    ]


def search_item(id: str, status: str, query: str, *urls: str) -> JSON:
    sources = [{"type": "url", "url": url} for url in urls]
    action = {"type": "search", "query": query, "queries": [query], "sources": sources}
    return {"id": id, "type": "web_search_call", "status": status, "action": action}


def tool_start(index: int, name: str = "f", id: str = "t1") -> JSON:
    return block_start(index, type="tool_use", id=id, name=name, input={})


def stopped(reason: str, *before: JSON, **delta: Any) -> List[Step]:
    """The last two events of upstream, the second with what it makes."""
    return [(message_delta(reason, **delta), []), (MESSAGE_STOP, list(before))]


class ResponsePlaybook(NamedTuple):
    """A stream: each event with the events that the client gets for it, at once."""

    steps: List[Step]
    reply: shim.ResponsesReply = RESPONSE_REPLY

    def events(self) -> List[JSON]:
        return [given for given, _ in self.steps]

    def told(self, number: Optional[int] = None, *more: JSON) -> List[JSON]:
        """What the first events make, and `more`, with the numbers that all events have."""
        made = [told for _, step in self.steps[:number] for told in step]
        return [{**told, "sequence_number": n} for n, told in enumerate([*made, *more])]

    def transform(self) -> shim.EventTransform:
        return shim.EventTransform(shim.ResponsesStreamEncoder(self.reply))


UML = "\u00fc\u4e16\U0001f600"
WHOLE_TEXT = message_item("msg_7_0", "completed", text_part(f"Hel{UML}"))
NO: JSON = {"type": "refusal", "category": "cyber", "explanation": "No."}
CITED = {
    "type": "web_search_result_location",
    "url": "https://w.example",
    "title": "W",
    "encrypted_index": "Eo8B",
    "cited_text": "It is 21C",
}
URL_CITATION = {
    "type": "url_citation",
    "start_index": 4,
    "end_index": 8,
    "title": "W",
    "url": "https://w.example",
}
FOUND = [{"type": "web_search_result", "url": "https://w.example", "title": "W"}]

RESPONSE_PLAYBOOKS = [
    case(
        "text",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (block_start(0, type="text", text=""), text_opened("msg_7_0")),
                (PING, []),
                (text_delta(0, "Hel"), [text_told("msg_7_0", "Hel")]),
                (text_delta(0, UML), [text_told("msg_7_0", UML)]),
                (block_stop(0), []),
                *stopped("end_turn", *text_closed("msg_7_0", f"Hel{UML}"), finished_by(WHOLE_TEXT)),
            ]
        ),
    ),
    case(
        "one function call",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (tool_start(0), [added(function_item("fc_7_0", "in_progress", "t1", ""))]),
                (json_delta(0, ""), []),
                (json_delta(0, '{"a":'), [arguments_told("fc_7_0", '{"a":')]),
                (json_delta(0, '"x"}'), [arguments_told("fc_7_0", '"x"}')]),
                (block_stop(0), []),
                *stopped(
                    "tool_use",
                    *arguments_closed(
                        "fc_7_0",
                        '{"a":"x"}',
                        function_item("fc_7_0", "completed", "t1", '{"a":"x"}'),
                    ),
                    finished_by(function_item("fc_7_0", "completed", "t1", '{"a":"x"}')),
                ),
            ]
        ),
    ),
    case(
        "text, then two calls without arguments, one of a namespace (#23, #36, #38)",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (
                    block_start(0, type="text", text=UML),
                    [*text_opened("msg_7_0"), text_told("msg_7_0", UML)],
                ),
                (block_stop(0), []),
                (
                    tool_start(1),
                    [
                        *text_closed("msg_7_0", UML),
                        added(function_item("fc_7_1", "in_progress", "t1", "")),
                    ],
                ),
                (json_delta(1, ""), []),
                (block_stop(1), []),
                (
                    tool_start(2, "ns__g", "t2"),
                    [
                        arguments_told("fc_7_1", "{}"),
                        *arguments_closed(
                            "fc_7_1", "{}", function_item("fc_7_1", "completed", "t1", "{}")
                        ),
                        added(
                            function_item(
                                "fc_7_2", "in_progress", "t2", "", name="g", namespace="ns"
                            )
                        ),
                    ],
                ),
                (block_stop(2), []),
                *stopped(
                    "tool_use",
                    arguments_told("fc_7_2", "{}"),
                    *arguments_closed(
                        "fc_7_2",
                        "{}",
                        function_item("fc_7_2", "completed", "t2", "{}", name="g", namespace="ns"),
                    ),
                    finished_by(
                        message_item("msg_7_0", "completed", text_part(UML)),
                        function_item("fc_7_1", "completed", "t1", "{}"),
                        function_item("fc_7_2", "completed", "t2", "{}", name="g", namespace="ns"),
                    ),
                ),
            ]
        ),
    ),
    case(
        "a call of a tool of free text comes back as one (#27)",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (tool_start(0, "p"), [added(custom_item("ctc_7_0", "in_progress", ""))]),
                (json_delta(0, '{"input":"*** '), []),
                (json_delta(0, f'{UML}"}}'), []),
                (block_stop(0), []),
                *stopped(
                    "tool_use",
                    of_item("ctc_7_0", "custom_tool_call_input.delta", delta=f"*** {UML}"),
                    of_item("ctc_7_0", "custom_tool_call_input.done", input=f"*** {UML}"),
                    done(custom_item("ctc_7_0", "completed", f"*** {UML}")),
                    finished_by(custom_item("ctc_7_0", "completed", f"*** {UML}")),
                ),
            ]
        ),
    ),
    case(
        "a search for tools that the client is to run",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (
                    tool_start(0, "tool_search"),
                    [
                        added(
                            {
                                "id": "tsc_7_0",
                                "type": "tool_search_call",
                                "status": "in_progress",
                                "execution": "client",
                                "call_id": "t1",
                                "arguments": {},
                            }
                        )
                    ],
                ),
                (json_delta(0, f'{{"query":"{UML}"}}'), []),
                (block_stop(0), []),
                *stopped(
                    "tool_use",
                    done(
                        {
                            "id": "tsc_7_0",
                            "type": "tool_search_call",
                            "status": "completed",
                            "execution": "client",
                            "call_id": "t1",
                            "arguments": {"query": UML},
                        }
                    ),
                    finished_by(
                        {
                            "id": "tsc_7_0",
                            "type": "tool_search_call",
                            "status": "completed",
                            "execution": "client",
                            "call_id": "t1",
                            "arguments": {"query": UML},
                        }
                    ),
                ),
            ]
        ),
    ),
    case(
        "a reasoning summary with its signed block, then text",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (
                    block_start(0, type="thinking", thinking="", signature=""),
                    [added(reasoning_item("rs_7_0"))],
                ),
                (
                    block_delta(0, type="thinking_delta", thinking="h"),
                    [
                        summary_part("rs_7_0", "added", ""),
                        summary_text("rs_7_0", "delta", delta="h"),
                    ],
                ),
                (
                    block_delta(0, type="thinking_delta", thinking="m"),
                    [summary_text("rs_7_0", "delta", delta="m")],
                ),
                (block_delta(0, type="signature_delta", signature="EqQB"), []),
                (block_stop(0), []),
                (
                    block_start(1, type="text", text=""),
                    [
                        summary_text("rs_7_0", "done", text="hm"),
                        summary_part("rs_7_0", "done", "hm"),
                        done(reasoning_item("rs_7_0", "hm", thought())),
                        *text_opened("msg_7_1"),
                    ],
                ),
                (text_delta(1, UML), [text_told("msg_7_1", UML)]),
                (block_stop(1), []),
                *stopped(
                    "end_turn",
                    *text_closed("msg_7_1", UML),
                    finished_by(
                        reasoning_item("rs_7_0", "hm", thought()),
                        message_item("msg_7_1", "completed", text_part(UML)),
                    ),
                ),
            ]
        ),
    ),
    case(
        "thoughts that are not shown, redacted, and not signed (S3-B1)",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (
                    block_start(0, type="thinking", thinking="", signature=""),
                    [added(reasoning_item("rs_7_0"))],
                ),
                (block_delta(0, type="signature_delta", signature="EqQB"), []),
                (block_stop(0), []),
                (
                    block_start(1, **HIDDEN_THOUGHT),
                    [
                        done(reasoning_item("rs_7_0", "", thought(""))),
                        added(reasoning_item("rs_7_1")),
                    ],
                ),
                (block_stop(1), []),
                (
                    block_start(2, type="thinking", thinking=""),
                    [
                        done(reasoning_item("rs_7_1", "", HIDDEN_THOUGHT)),
                        added(reasoning_item("rs_7_2")),
                    ],
                ),
                (
                    block_delta(2, type="thinking_delta", thinking=UML),
                    [
                        summary_part("rs_7_2", "added", ""),
                        summary_text("rs_7_2", "delta", delta=UML),
                    ],
                ),
                (block_stop(2), []),
                *stopped(
                    "end_turn",
                    summary_text("rs_7_2", "done", text=UML),
                    summary_part("rs_7_2", "done", UML),
                    done(reasoning_item("rs_7_2", UML)),
                    finished_by(
                        reasoning_item("rs_7_0", "", thought("")),
                        reasoning_item("rs_7_1", "", HIDDEN_THOUGHT),
                        reasoning_item("rs_7_2", UML),
                    ),
                ),
            ]
        ),
    ),
    case(
        "a refusal at once is a completed answer (0.16: else Codex pays six times)",
        ResponsePlaybook(
            [
                RESPONSE_START,
                *stopped(
                    "refusal",
                    added(message_item("msg_7_0", "in_progress")),
                    *refusal_told("msg_7_0", 0, f"No{UML}"),
                    done(
                        message_item(
                            "msg_7_0", "completed", {"type": "refusal", "refusal": f"No{UML}"}
                        )
                    ),
                    finished_by(
                        message_item(
                            "msg_7_0", "completed", {"type": "refusal", "refusal": f"No{UML}"}
                        )
                    ),
                    stop_details={**NO, "explanation": f"No{UML}"},
                ),
            ]
        ),
    ),
    case(
        "a refusal for Codex is a message of plain text, because it drops all others",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (block_start(0, type="text", text=""), text_opened("msg_7_0")),
                (text_delta(0, UML), [text_told("msg_7_0", UML)]),
                (block_stop(0), []),
                *stopped(
                    "refusal",
                    *text_closed("msg_7_0", UML),
                    *text_opened("msg_7_1"),
                    text_told("msg_7_1", "No."),
                    *text_closed("msg_7_1", "No."),
                    finished_by(
                        message_item("msg_7_0", "completed", text_part(UML)),
                        message_item("msg_7_1", "completed", text_part("No.")),
                    ),
                    stop_details=NO,
                ),
            ],
            RESPONSE_REPLY._replace(plain_refusal=True),
        ),
    ),
    case(
        "a refusal after text is a second part",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (block_start(0, type="text", text=""), text_opened("msg_7_0")),
                (text_delta(0, UML), [text_told("msg_7_0", UML)]),
                (block_stop(0), []),
                *stopped(
                    "refusal",
                    *part_closed("msg_7_0", UML),
                    *refusal_told("msg_7_0", 1, "The model declined to answer."),
                    done(
                        message_item(
                            "msg_7_0",
                            "completed",
                            text_part(UML),
                            {"type": "refusal", "refusal": "The model declined to answer."},
                        )
                    ),
                    finished_by(
                        message_item(
                            "msg_7_0",
                            "completed",
                            text_part(UML),
                            {"type": "refusal", "refusal": "The model declined to answer."},
                        )
                    ),
                ),
            ]
        ),
    ),
    case(
        "text that is cut off is incomplete (#33)",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (block_start(0, type="text", text=""), text_opened("msg_7_0")),
                (text_delta(0, UML), [text_told("msg_7_0", UML)]),
                (block_stop(0), []),
                *stopped(
                    "max_tokens",
                    *text_closed("msg_7_0", UML, "incomplete"),
                    finished_by(
                        message_item("msg_7_0", "incomplete", text_part(UML)),
                        reason="max_output_tokens",
                    ),
                ),
            ]
        ),
    ),
    case(
        "a call that is cut off is not completed; the text before it is",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (block_start(0, type="text", text=""), text_opened("msg_7_0")),
                (text_delta(0, UML), [text_told("msg_7_0", UML)]),
                (block_stop(0), []),
                (
                    tool_start(1),
                    [
                        *text_closed("msg_7_0", UML),
                        added(function_item("fc_7_1", "in_progress", "t1", "")),
                    ],
                ),
                (json_delta(1, '{"a":'), [arguments_told("fc_7_1", '{"a":')]),
                (block_stop(1), []),
                *stopped(
                    "model_context_window_exceeded",
                    *arguments_closed(
                        "fc_7_1", '{"a":', function_item("fc_7_1", "incomplete", "t1", '{"a":')
                    ),
                    finished_by(
                        message_item("msg_7_0", "completed", text_part(UML)),
                        function_item("fc_7_1", "incomplete", "t1", '{"a":'),
                        reason="max_output_tokens",
                    ),
                ),
            ]
        ),
    ),
    case(
        "a search of the web, and one message of the texts that cite it",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (
                    block_start(0, type="server_tool_use", id="s1", name="web_search", input={}),
                    [
                        added(search_item("ws_7_0", "in_progress", "")),
                        of_item("ws_7_0", "web_search_call.in_progress"),
                        of_item("ws_7_0", "web_search_call.searching"),
                    ],
                ),
                (json_delta(0, f'{{"query":"{UML}"}}'), []),
                (block_stop(0), []),
                (
                    block_start(1, type="web_search_tool_result", tool_use_id="s1", content=FOUND),
                    [],
                ),
                (block_stop(1), []),
                (
                    block_start(2, type="text", text=""),
                    [
                        of_item("ws_7_0", "web_search_call.completed"),
                        done(search_item("ws_7_0", "completed", UML, "https://w.example")),
                        *text_opened("msg_7_1"),
                    ],
                ),
                (text_delta(2, "Now "), [text_told("msg_7_1", "Now ")]),
                (block_stop(2), []),
                (block_start(3, type="text", text="", citations=[]), []),
                (block_delta(3, type="citations_delta", citation=CITED), []),
                (text_delta(3, "21C."), [text_told("msg_7_1", "21C.")]),
                (block_stop(3), []),
                *stopped(
                    "end_turn",
                    of_item(
                        "msg_7_1",
                        "output_text.annotation.added",
                        content_index=0,
                        annotation_index=0,
                        annotation=URL_CITATION,
                    ),
                    *part_closed("msg_7_1", "Now 21C.", URL_CITATION),
                    done(message_item("msg_7_1", "completed", text_part("Now 21C.", URL_CITATION))),
                    finished_by(
                        search_item("ws_7_0", "completed", UML, "https://w.example"),
                        message_item("msg_7_1", "completed", text_part("Now 21C.", URL_CITATION)),
                    ),
                ),
            ]
        ),
    ),
    case(
        "a search that fails; server tools that nobody asks to see leave no gap (#36)",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (
                    block_start(
                        0, type="server_tool_use", id="c1", name="code_execution", input={}
                    ),
                    [],
                ),
                (json_delta(0, '{"code":"1"}'), []),
                (block_stop(0), []),
                (
                    block_start(1, type="code_execution_tool_result", tool_use_id="c1", content={}),
                    [],
                ),
                (block_stop(1), []),
                (
                    block_start(
                        2, type="server_tool_use", id="s1", name="web_search", input={"query": UML}
                    ),
                    [
                        added(search_item("ws_7_0", "in_progress", UML)),
                        of_item("ws_7_0", "web_search_call.in_progress"),
                        of_item("ws_7_0", "web_search_call.searching"),
                    ],
                ),
                (block_stop(2), []),
                (
                    block_start(
                        3,
                        type="web_search_tool_result",
                        tool_use_id="s1",
                        content={
                            "type": "web_search_tool_result_error",
                            "error_code": "unavailable",
                        },
                    ),
                    [],
                ),
                (block_stop(3), []),
                *stopped(
                    "end_turn",
                    of_item("ws_7_0", "web_search_call.completed"),
                    done(search_item("ws_7_0", "failed", UML)),
                    finished_by(search_item("ws_7_0", "failed", UML)),
                ),
            ]
        ),
    ),
    case(
        "a summary is one item, whatever else was thought",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (block_start(0, type="thinking", thinking="", signature=""), []),
                (block_delta(0, type="thinking_delta", thinking="hm"), []),
                (block_stop(0), []),
                (
                    block_start(1, type="text", text=""),
                    [added({"id": "cmp_7_0", "type": "compaction", "encrypted_content": ""})],
                ),
                (text_delta(1, UML), []),
                (block_stop(1), []),
                *stopped(
                    "end_turn",
                    done(
                        {
                            "id": "cmp_7_0",
                            "type": "compaction",
                            "encrypted_content": envelope({"summary": UML}),
                        }
                    ),
                    finished_by(
                        {
                            "id": "cmp_7_0",
                            "type": "compaction",
                            "encrypted_content": envelope({"summary": UML}),
                        }
                    ),
                ),
            ],
            RESPONSE_REPLY._replace(compacts=True),
        ),
    ),
    case(
        "a JSON object loses the fence around it",
        ResponsePlaybook(
            [
                RESPONSE_START,
                (block_start(0, type="text", text=""), text_opened("msg_7_0")),
                (text_delta(0, "```json\n"), []),
                (text_delta(0, f'{{"a":"{UML}"}}'), [text_told("msg_7_0", f'{{"a":"{UML}"}}')]),
                (text_delta(0, "\n```"), []),
                (block_stop(0), []),
                *stopped(
                    "end_turn",
                    *text_closed("msg_7_0", f'{{"a":"{UML}"}}'),
                    finished_by(
                        message_item("msg_7_0", "completed", text_part(f'{{"a":"{UML}"}}'))
                    ),
                ),
            ],
            RESPONSE_REPLY._replace(json_object=True),
        ),
    ),
]


@pytest.mark.parametrize("playbook", RESPONSE_PLAYBOOKS)
def test_response_stream_whole_and_byte_by_byte(playbook: ResponsePlaybook) -> None:
    for written in WRITTEN:
        raw = written(sse(*playbook.events()))
        whole, bytewise = playbook.transform(), playbook.transform()
        at_once = whole.feed(raw)
        assert chunks(at_once) == playbook.told(), written.__name__
        assert b"".join(bytewise.feed(raw[i : i + 1]) for i in range(len(raw))) == at_once
        assert (whole.complete, bytewise.complete) == (True, True)
        assert whole.end() + bytewise.end() == b""


@pytest.mark.parametrize("playbook", RESPONSE_PLAYBOOKS)
def test_response_stream_answers_each_event_at_once(playbook: ResponsePlaybook) -> None:
    transform = playbook.transform()
    made = [chunks(transform.feed(sse(given))) for given in playbook.events()]
    assert list(map(len, made)) == [len(step) for _, step in playbook.steps]
    assert [told for step in made for told in step] == playbook.told()


@pytest.mark.parametrize("playbook", RESPONSE_PLAYBOOKS)
def test_response_stream_names_each_event_by_its_type(playbook: ResponsePlaybook) -> None:
    """No event without data, no id, no [DONE] (0.5)."""
    stream = playbook.transform().feed(sse(*playbook.events())).decode("ascii")
    lines = [block.split("\n") for block in stream.split("\n\n")[:-1]]
    assert all(len(block) == 2 for block in lines)
    types = [json.loads(data[len("data: ") :])["type"] for _, data in lines]
    assert [name for name, _ in lines] == [f"event: {type_}" for type_ in types]


def failure_of(playbook: ResponsePlaybook, number: int, error: JSON) -> List[JSON]:
    """What is told after the first events, when nothing but an error follows."""
    told = playbook.told(number)
    items = [e["item"] for e in told if e["type"] == "response.output_item.done"]
    short = {"code": error["code"], "message": error["message"]}
    failed = {**RESPONSE, "status": "failed", "output": items, "error": short}
    return playbook.told(
        number, event("error", error=error), event("response.failed", response=failed)
    )


RESPONSE_CUT = {**CUT["error"], "code": "server_error"}


@pytest.mark.parametrize("playbook", RESPONSE_PLAYBOOKS)
def test_response_stream_cut_off_has_failed(playbook: ResponsePlaybook) -> None:
    """At each event and inside it: never response.completed (#30, #32)."""
    events = playbook.events()
    for number, given in enumerate(events):
        last = sse(given)
        for cut in (0, len(last) // 2, len(last) - 1):
            transform = playbook.transform()
            made = transform.feed(sse(*events[:number]) + last[:cut]) + transform.end()
            assert chunks(made) == failure_of(playbook, number, RESPONSE_CUT)
            assert b"response.completed" not in made
            assert transform.feed(last[cut:]) + transform.end() == b""
            assert transform.complete is False


@pytest.mark.parametrize("playbook", RESPONSE_PLAYBOOKS)
def test_response_stream_error_in_the_middle_ends_it(playbook: ResponsePlaybook) -> None:
    events = playbook.events()
    overloaded = OVERLOADED_CHUNK["error"]
    for number in range(len(events)):
        raw = sse(*events[:number], OVERLOADED, *events[number:])
        for size in (len(raw), 100):
            transform = playbook.transform()
            made = [transform.feed(raw[i : i + size]) for i in range(0, len(raw), size)]
            made.append(transform.end())
            assert chunks(b"".join(made)) == failure_of(playbook, number, overloaded)
            assert transform.complete is False


FAILURE_CODES = [
    case(
        "overloaded: Codex tries five times, not thirty",
        "overloaded_error",
        "x",
        "server_is_overloaded",
    ),
    case("a limit", "rate_limit_error", "x", "rate_limit_exceeded"),
    case("no money", "billing_error", "x", "insufficient_quota"),
    case("too long", "invalid_request_error", "prompt is too long: 9", "context_length_exceeded"),
    case("a bad request is not sent again", "invalid_request_error", "x", "invalid_prompt"),
    case("anything else", "api_error", "x", "server_error"),
]


@pytest.mark.parametrize(("type_", "text", "code"), FAILURE_CODES)
def test_response_failure_has_a_code_that_codex_knows(type_: str, text: str, code: str) -> None:
    transform = shim.EventTransform(shim.ResponsesStreamEncoder(RESPONSE_REPLY))
    failing = {"type": "error", "error": {"type": type_, "message": text}}
    error, failed = chunks(transform.feed(sse(failing)))
    assert (error["error"]["code"], failed["response"]["error"]["code"]) == (code, code)


@pytest.mark.parametrize("playbook", RESPONSE_PLAYBOOKS)
def test_response_in_one_piece_is_what_the_stream_ends_with(playbook: ResponsePlaybook) -> None:
    assembler = shim.MessageAssembler()
    for given in playbook.events():
        assembler.feed(given)
    assert assembler.message is not None
    before = json.dumps(assembler.message)
    whole = shim.response_from_message(assembler.message, playbook.reply)
    assert shim.loads(shim.dumps(whole)) == playbook.told()[-1]["response"]
    assert json.dumps(assembler.message) == before


@pytest.mark.parametrize("playbook", RESPONSE_PLAYBOOKS)
def test_response_remembers_its_message_once_and_leaves_events_alone(
    playbook: ResponsePlaybook,
) -> None:
    told: List[Tuple[JSON, JSON]] = []
    encoder = shim.ResponsesStreamEncoder(playbook.reply, lambda *both: told.append(both))
    before = json.dumps(playbook.events())
    last = chunks(b"".join(encoder.feed(given) for given in playbook.events()))[-1]
    assert [response for _, response in told] == [last["response"]]
    assert told[0][0]["id"] == "msg_01"
    assert json.dumps(playbook.events()) == before


def test_response_of_an_upstream_that_sends_nonsense_ends_in_order() -> None:
    """Each member of each event spoiled: the stream ends as one can, and nothing is raised."""
    (playbook,) = (p.values[0] for p in RESPONSE_PLAYBOOKS if "and one message of" in str(p.id))
    events = playbook.events()
    ends = {"response.completed", "response.incomplete", "response.failed"}
    for number, given in enumerate(events):
        for wrong in (value for value in spoiled(given) if isinstance(value, dict)):
            spoilt = [*events[:number], wrong, *events[number + 1 :]]
            raw = b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in spoilt)
            transform = playbook.transform()
            made = chunks(transform.feed(raw) + transform.end())
            assert made[-1]["type"] in ends, wrong
            assert [e["sequence_number"] for e in made] == list(range(len(made)))


def test_response_splices_text_as_it_stands() -> None:
    """Percent signs of a template, escapes and characters of several bytes."""
    parts = ["100 %", "%d %b", 'a"\\\n', "\u2028", UML]
    events = [
        message_start(),
        block_start(0, type="text", text=""),
        *(text_delta(0, p) for p in parts),
    ]
    encoder = shim.ResponsesStreamEncoder(RESPONSE_REPLY._replace(id="resp_%s"))
    made = chunks(shim.EventTransform(encoder).feed(sse(*events)))
    assert [e["delta"] for e in made[4:]] == parts
    assert [e["sequence_number"] for e in made] == list(range(9))
    assert {e["item_id"] for e in made[4:]} == {"msg_%s_0"}


def test_response_without_any_summary_has_failed() -> None:
    reply = RESPONSE_REPLY._replace(compacts=True)
    transform = shim.EventTransform(shim.ResponsesStreamEncoder(reply))
    made = chunks(transform.feed(sse(message_start(), message_delta("end_turn"), MESSAGE_STOP)))
    assert [e["type"] for e in made][2:] == ["error", "response.failed"]
    with pytest.raises(shim.UpstreamCutError, match="no summary"):
        shim.response_from_message(chat_message_of(), reply)


def test_response_heartbeat_is_an_event_once_it_has_begun() -> None:
    """Codex's idle timer hears no comments; before response.created there may be no event."""
    encoder = shim.ResponsesStreamEncoder(RESPONSE_REPLY)
    assert encoder.heartbeat == b": keep-alive\n\n"
    encoder.feed(message_start())
    expected = b'event: keepalive\ndata: {"type":"keepalive","sequence_number":2}\n\n'
    assert encoder.heartbeat == expected


def test_response_that_ends_before_it_began_is_an_error() -> None:
    transform = shim.EventTransform(shim.ResponsesStreamEncoder(RESPONSE_REPLY))
    made = chunks(transform.feed(sse(block_start(0, type="text", text="a"), MESSAGE_STOP)))
    assert [e["type"] for e in made] == ["error", "response.failed"]


def test_response_usage_counts_the_cache() -> None:
    told = {
        "input_tokens": 12,
        "cache_creation_input_tokens": 1500,
        "cache_read_input_tokens": 8000,
        "output_tokens": 90,
        "output_tokens_details": {"thinking_tokens": 40},
    }
    assert shim.responses_usage(told) == {
        "input_tokens": 9512,
        "input_tokens_details": {"cached_tokens": 8000, "cache_write_tokens": 1500},
        "output_tokens": 90,
        "output_tokens_details": {"reasoning_tokens": 40},
        "total_tokens": 9602,
    }


@pytest.mark.parametrize(("fields", "plain"), [({}, False), ({"client_metadata": {}}, True)])
def test_responses_plain_refusal_is_for_codex(fields: JSON, plain: bool) -> None:
    draft = drafted({**asks(GREETING), **fields})
    assert shim.ResponsesReply.to(draft, "resp_7", lambda: 7).plain_refusal is plain


def test_response_repeats_its_request() -> None:
    fields = {
        "instructions": "Be brief.",
        "max_output_tokens": 99,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
        "text": {"verbosity": "low"},
        "tools": [flat()],
        "tool_choice": {"type": "function", "name": "f"},
        "truncation": "auto",
        "user": "u",
    }
    unknown = {
        "status": "x",
        "error": "x",
        "output": "x",
        "usage": "x",
        "object": "x",
        "service_tier": "flex",
    }
    draft = drafted({**asks(GREETING), **fields, **unknown})
    reply = shim.ResponsesReply.to(draft, "resp_7", lambda: 7)
    made = shim.response_from_message(chat_message_of(says("a")), reply)
    expected = {
        **RESPONSE,
        **fields,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "status": "completed",
        "completed_at": 7,
        "output": [message_item("msg_7_0", "completed", text_part("a"))],
        "usage": RESPONSE_USAGE,
    }
    assert made == expected
    assert list(made) == list(RESPONSE)


# ----------------------------------------------------------------------
# 8. Credentials
# ----------------------------------------------------------------------

CLIENT_HEADERS = {
    "x-api-key": "sk-ant-api03-of-the-client",
    "authorization": "Bearer token-of-the-client",
    "api-key": "azure-of-the-client",
}

CREDENTIALS = [
    case(
        "an API key goes up alone, whatever the client sent",
        shim.APIKey("sk-ant-api03-ours", "the test"),
        CLIENT_HEADERS,
        [("x-api-key", "sk-ant-api03-ours")],
    ),
    case("no credential sends nothing", shim.NoCredential(), CLIENT_HEADERS, []),
    case(
        "passthrough sends one header where the client sent three",
        shim.Passthrough(),
        CLIENT_HEADERS,
        [("x-api-key", "sk-ant-api03-of-the-client")],
    ),
    case(
        "passthrough leaves a bearer token a bearer token (S3-B23)",
        shim.Passthrough(),
        {"authorization": "Bearer sk-ant-oat01-t"},
        [("authorization", "Bearer sk-ant-oat01-t")],
    ),
    case(
        "passthrough makes Azure's api-key Anthropic's",
        shim.Passthrough(),
        {"api-key": "sk-ant-api03-c"},
        [("x-api-key", "sk-ant-api03-c")],
    ),
    case(
        "passthrough takes an empty header for none",
        shim.Passthrough(),
        {"x-api-key": "", "authorization": "Bearer t"},
        [("authorization", "Bearer t")],
    ),
]


@pytest.mark.parametrize(("credential", "client", "expected"), CREDENTIALS)
def test_credential_headers(credential: shim.Credential, client: Any, expected: Any) -> None:
    assert credential.authorization(client) == expected


@pytest.mark.parametrize("client", [{}, {"x-api-key": ""}, {"x-claude-shim-key": "k"}])
def test_passthrough_without_a_key_is_401(client: Dict[str, str]) -> None:
    with pytest.raises(shim.AuthenticationError) as caught:
        shim.Passthrough().authorization(client)
    assert caught.value.status == 401
    assert "x-api-key" in caught.value.message


def test_credential_never_shows_its_secret() -> None:
    key = shim.APIKey("sk-ant-api03-ours", "ANTHROPIC_API_KEY")
    assert key.secrets() == ["sk-ant-api03-ours"]
    assert "sk-ant" not in f"{key!r} {key} {key.describe()}"
    assert str(key.describe()) == (
        "API key from ANTHROPIC_API_KEY, billed to its Claude Console organisation"
    )
    keys = shim.ClientKeys({"ann": "secret-of-ann"})
    assert keys.secrets() == ["secret-of-ann"]
    assert "secret-of-ann" not in f"{keys!r} {keys}"


# --- files that hold secrets

ON_POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and owners are POSIX's")


def secret_file(path: Path, text: str, mode: int = 0o600) -> str:
    """Write a file with a mode, and return its path."""
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def test_secret_file_is_read_through_a_link_of_its_owner(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "real", "\ufeffs\u00e9cret")
    (tmp_path / "link").symlink_to("real")
    assert shim.read_secret_file(path) == "s\u00e9cret"
    assert shim.read_secret_file(str(tmp_path / "link")) == "s\u00e9cret"


def as_readable(path: Path) -> None:
    secret_file(path, "hunter2", 0o640)


def as_world_readable(path: Path) -> None:
    secret_file(path, "hunter2", 0o604)


def as_link_to_readable(path: Path) -> None:
    (path.parent / "folder").mkdir()
    (path.parent / "way").symlink_to("folder")
    secret_file(path.parent / "it's it", "hunter2", 0o640)
    path.symlink_to("way/../it's it")


def as_link_to_link(path: Path) -> None:
    (path.parent / "b").symlink_to("c")
    path.symlink_to("b")


def as_latin_1(path: Path) -> None:
    path.write_bytes(b"hunter2\xe9")
    path.chmod(0o600)


def as_another_users(path: Path) -> None:
    secret_file(path, "hunter2")
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 4711, -1)


def as_another_users_link(path: Path) -> None:
    secret_file(path.parent / "real", "hunter2")
    path.symlink_to("real")
    if os.geteuid() != 0:
        pytest.skip("only root can give a link away")
    os.chown(path, 4711, -1, follow_symlinks=False)


BAD_SECRET_FILES = [
    case("nothing", lambda path: None, "cannot read {}: No such file or directory"),
    case("a folder", Path.mkdir, "{} is no regular file"),
    case("a FIFO, which nobody waits for", os.mkfifo, "{} is no regular file")
    if hasattr(os, "mkfifo")
    else case("no FIFO here", Path.mkdir, "{} is no regular file"),
    case("group-readable", as_readable, "{0} can be read by others: run chmod 600 {0}"),
    case("world-readable", as_world_readable, "{0} can be read by others: run chmod 600 {0}"),
    case(
        "a link to a group-readable one, which is to be changed",
        as_link_to_readable,
        "{0} can be read by others: run chmod 600 '{0.parent}/it'\"'\"'s it'",
    ),
    case("a link to a link", as_link_to_link, "cannot read {}: a link to a link"),
    case("not UTF-8", as_latin_1, "cannot read {}: not UTF-8"),
    case("another's", as_another_users, "{0} belongs to another user: run chown 0 {0}"),
    case(
        "another's link",
        as_another_users_link,
        "{} is a symbolic link of another user: name the file itself",
    ),
]


@ON_POSIX
@pytest.mark.parametrize(("make", "message"), BAD_SECRET_FILES)
def test_secret_file_that_is_not_ours_alone_is_refused_with_what_to_do_s1_b7(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "secret"
    make(path)
    with pytest.raises(shim.ConfigError) as caught:
        shim.read_secret_file(str(path))
    assert str(caught.value) == message.format(path)


@ON_POSIX
def test_secret_file_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    """Not as wide as the one before it, and a new folder likewise."""
    old = secret_file(tmp_path / "old", "before", 0o644)
    shim.write_secret_file(old, "after")
    assert (Path(old).read_text(), os.stat(old).st_mode & 0o777) == ("after", 0o600)
    new = tmp_path / "folder" / "new"
    shim.write_secret_file(str(new), "first")
    assert new.read_text() == "first"
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to("old")
    shim.write_secret_file(str(tmp_path / "link"), "through the link")
    assert (tmp_path / "link").is_symlink()
    assert Path(old).read_text() == "through the link"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "link", "old"]


def test_secret_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        shim.write_secret_file(str(tmp_path / "taken"), "hunter2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


# --- tokens

NOW = 1_795_300_000.0  # 2026-11-21T22:26:40Z

EXPIRIES = [
    case("seconds", 1_795_300_000, NOW),
    case("seconds with a fraction", 1_795_300_000.5, NOW + 0.5),
    case("milliseconds, as Claude Code writes them", 1_795_300_000_000, NOW),
    case("seconds as text", "1795300000", NOW),
    case("ISO 8601 with Z", "2026-11-21T22:26:40Z", NOW),
    case("ISO 8601 with a fraction of any length", "2026-11-21T22:26:40.12Z", NOW),
    case("ISO 8601 with an offset", "2026-11-22T00:26:40+02:00", NOW),
    case("ISO 8601 without one is UTC", "2026-11-21 22:26:40", NOW),
    case("none", None, None),
    case("empty", "", None),
]


@pytest.mark.parametrize(("value", "expected"), EXPIRIES)
def test_expiry_in_all_its_forms_s1_r8(value: Any, expected: Optional[float]) -> None:
    text = json.dumps({"access_token": "at", "refresh_token": "rt", "expires_at": value})
    assert shim.parsed_bundle(text, "FILE") == shim.Bundle("at", "rt", expected)


BAD_BUNDLES = [
    case("no JSON", "hunter2", "FILE is no JSON object with the texts access_token, refresh_token"),
    case(
        "a list", '["hunter2"]', "FILE is no JSON object with the texts access_token, refresh_token"
    ),
    case(
        "too deep",
        "[" * 100_000,
        "FILE is no JSON object with the texts access_token, refresh_token",
    ),
    case(
        "no access token",
        '{"refresh_token": "hunter2"}',
        "FILE is no JSON object with the texts access_token, refresh_token",
    ),
    case(
        "a token that is a number",
        '{"access_token": "a", "refresh_token": 2}',
        "FILE is no JSON object with the texts access_token, refresh_token",
    ),
    case(
        "a token that could break out of its header",
        '{"access_token": "a\\r\\nX-Evil: hunter2"}',
        "the key from FILE holds white space or characters beyond ASCII",
    ),
    case(
        "an expiry that is none",
        '{"access_token": "a", "expires_at": "hunter2"}',
        "FILE: expires_at is neither ISO 8601 nor seconds or milliseconds",
    ),
    case(
        "an expiry that no clock will see",
        '{"access_token": "a", "expires_at": 1e300}',
        "FILE: expires_at is neither ISO 8601 nor seconds or milliseconds",
    ),
    case(
        "an expiry that is infinite",
        '{"access_token": "a", "expires_at": "' + "9" * 400 + '"}',
        "FILE: expires_at is neither ISO 8601 nor seconds or milliseconds",
    ),
    case(
        "an expiry that is true",
        '{"access_token": "a", "expires_at": true}',
        "FILE: expires_at is neither ISO 8601 nor seconds or milliseconds",
    ),
    case(
        "Claude Code's own",
        '{"claudeAiOauth": {"accessToken": "hunter2"}}',
        "FILE is Claude Code's own file: use --auth claude-code instead",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_BUNDLES)
def test_bad_bundle_is_told_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        shim.parsed_bundle(text, "FILE")
    assert str(caught.value) == message


WRITTEN_EXPIRIES = [
    case("seconds stay seconds", 5, 1_795_300_000),
    case("milliseconds stay milliseconds", 1_700_000_000_000, 1_795_300_000_000),
    case("text stays text", "2020-01-01T00:00:00Z", "2026-11-21T22:26:40Z"),
    case("without one it is text", None, "2026-11-21T22:26:40Z"),
]


@pytest.mark.parametrize(("old", "expected"), WRITTEN_EXPIRIES)
def test_bundle_is_written_in_the_form_it_had(old: Any, expected: Any) -> None:
    document = {"version": "1.0", "expires_at": old, "access_token": "old"}
    text = shim.bundle_text(shim.Bundle("at", "rt", NOW), document)
    assert json.loads(text) == {
        "version": "1.0",
        "expires_at": expected,
        "access_token": "at",
        "refresh_token": "rt",
    }


def test_no_repr_shows_a_token() -> None:
    values = (
        shim.Bundle("hunter2", "hunter2", 5.0),
        shim.TokenRequest("https://a.example", {"refresh_token": "hunter2"}),
        shim.TokenAnswer(200, [], b"hunter2"),
        shim.AuthToken("hunter2", "X"),
        shim.Renewed(Rotating(shim.Bundle("hunter2")), world()),
    )
    assert "hunter2" not in f"{values!r} {values[0]} {values[1]} {values[2]}"


class WallClock:
    """A clock that a test sets."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


TokenScript = Union[shim.TokenAnswer, Exception]


def in_tokens(access: str, refresh: Optional[str] = "rt-2", expires_in: Any = 3600) -> TokenScript:
    """An answer of a token endpoint: tokens."""
    body = {"access_token": access, "refresh_token": refresh, "expires_in": expires_in}
    given = {name: value for name, value in body.items() if value is not None}
    return shim.TokenAnswer(200, [], json.dumps(given).encode())


def no_tokens(status: int, body: Any = b"", **headers: str) -> TokenScript:
    """An answer of a token endpoint: an error."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return shim.TokenAnswer(status, list(headers.items()), raw)


class TokenEndpoint:
    """Plays one answer a request, the last one again and again, and records what it got."""

    def __init__(self, *answers: TokenScript) -> None:
        self._answers = list(answers)
        self.requests: List[shim.TokenRequest] = []

    def __call__(self, request: shim.TokenRequest) -> shim.TokenAnswer:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class World:
    """What a credential sees of the world, recorded."""

    def __init__(self, *answers: TokenScript, run: Any = None) -> None:
        self.endpoint = TokenEndpoint(*answers)
        self.told: List[str] = []
        self.hidden: List[str] = []
        self.clock = WallClock()
        self.full = False
        self.outside = shim.Outside(
            self.endpoint,
            self.told.append,
            self.hidden.append,
            self.clock,
            run or self.run,
            self.save,
        )

    def save(self, path: str, text: str) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        shim.write_secret_file(path, text)

    def run(self, command: Sequence[str]) -> Tuple[int, str]:
        raise AssertionError(f"no program should run: {command}")


def world(*answers: TokenScript) -> shim.Outside:
    """A world without a record."""
    return World(*answers).outside


VOID = "h.example says that the login is no longer valid: run `claude_shim login`"
NO_TOKEN = "check --token-url, or log in to your network first"

TOKEN_ANSWERS = [
    case("invalid_grant is final", no_tokens(400, {"error": "invalid_grant"}), 401, VOID),
    case(
        "invalid_grant in Anthropic's form",
        no_tokens(401, {"type": "error", "error": {"type": "invalid_grant", "message": "hunter2"}}),
        401,
        VOID,
    ),
    case(
        "another error is named, its words are not",
        no_tokens(400, {"error": "invalid_client", "error_description": "hunter2"}),
        503,
        "the token endpoint h.example answered with status 400 (invalid_client)",
    ),
    case(
        "an error that is no name",
        no_tokens(403, {"error": "hunter2 <script>"}),
        503,
        "the token endpoint h.example answered with status 403",
    ),
    case(
        "too many requests",
        no_tokens(429),
        503,
        "the token endpoint h.example answered with status 429",
    ),
    case(
        "a fault",
        no_tokens(500, b"<html>"),
        503,
        "the token endpoint h.example answered with status 500",
    ),
    case(
        "a page of a network that wants a login",
        no_tokens(200, b"<html>hunter2"),
        503,
        f"the token endpoint h.example answered with what is no token: {NO_TOKEN}",
    ),
    case(
        "a token that is no text",
        no_tokens(200, {"access_token": 5}),
        503,
        f"the token endpoint h.example answered with what is no token: {NO_TOKEN}",
    ),
    case(
        "a token that could break out of its header",
        no_tokens(200, {"access_token": "a\r\nX-Evil: hunter2"}),
        503,
        f"the token endpoint h.example answered with what is no token: {NO_TOKEN}",
    ),
    case(
        "a redirect, which would carry the login away",
        no_tokens(307, location="https://evil.example/token?hunter2"),
        503,
        "the token endpoint h.example redirects to https://evil.example, which is not followed: "
        "check --token-url",
    ),
    case(
        "a redirect to nowhere",
        no_tokens(302, location="http://[hunter2"),
        503,
        "the token endpoint h.example redirects to another page, which is not followed: "
        "check --token-url",
    ),
    case(
        "nobody there",
        shim.UpstreamUnreachableError("cannot reach upstream at h.example: refused"),
        503,
        "the token endpoint h.example gave no answer: cannot reach upstream at h.example: refused",
    ),
]


@pytest.mark.parametrize(("answer", "status", "message"), TOKEN_ANSWERS)
def test_token_endpoint_that_gives_none(answer: TokenScript, status: int, message: str) -> None:
    client = shim.OAuthClient(("https://h.example/token",))
    with pytest.raises((shim.CredentialError, shim.CredentialUnavailableError)) as caught:
        shim.granted(world(answer), client, {"refresh_token": "hunter2"})
    assert (caught.value.status, caught.value.message) == (status, message)


LIFETIMES = [
    case("as told", 28_800, NOW + 28_800),
    case("an hour when it is not told", None, NOW + 3600),
    case("an hour when it is no number", "soon", NOW + 3600),
    case("never less than two minutes, for the endpoint's sake", 0, NOW + 120),
    case("never in the past", -5, NOW + 120),
    case("never beyond ten years", 1e300, NOW + 315_360_000),
]


@pytest.mark.parametrize(("expires_in", "expected"), LIFETIMES)
def test_lifetime_of_a_token(expires_in: Any, expected: float) -> None:
    there = World(in_tokens("at-2", "rt-2", expires_in))
    bundle = shim.granted(there.outside, shim.OAuthClient(), {})
    assert bundle == shim.Bundle("at-2", "rt-2", expected)
    assert there.hidden == ["at-2", "rt-2"]


def test_older_host_is_asked_when_the_new_one_has_no_such_endpoint_s1_b2() -> None:
    there = World(no_tokens(404), in_tokens("at-2"))
    assert shim.granted(there.outside, shim.OAuthClient(), {"a": "b"}).access_token == "at-2"
    assert [(request.url, request.fields) for request in there.endpoint.requests] == [
        ("https://platform.claude.com/v1/oauth/token", {"a": "b"}),
        ("https://console.anthropic.com/v1/oauth/token", {"a": "b"}),
    ]


def test_no_other_host_is_asked_when_one_is_named() -> None:
    there = World(no_tokens(404), in_tokens("at-2"))
    with pytest.raises(shim.CredentialUnavailableError):
        shim.granted(there.outside, shim.OAuthClient(("https://h.example/token",)), {})
    assert [request.url for request in there.endpoint.requests] == ["https://h.example/token"]


# --- tokens that are renewed


class Rotating(shim.TokenSource):
    """Gives token after token; records which it was asked to replace."""

    kind = "oauth-bundle"
    place = "FILE"

    def __init__(self, first: shim.Bundle, *later: Union[shim.Bundle, Exception]) -> None:
        self._first = first
        self._later = list(later)
        self.asked: List[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def current(self) -> shim.Bundle:
        return self._first

    def renewed(self, old: shim.Bundle) -> shim.Bundle:
        self.asked.append(old.access_token)
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        later = self._later.pop(0) if len(self._later) > 1 else self._later[0]
        if isinstance(later, Exception):
            raise later
        return later


def shown(token: str) -> shim.HeaderList:
    return [("authorization", f"Bearer {token}"), ("anthropic-beta", "oauth-2025-04-20")]


LATER = shim.Bundle("at-2", "rt-2", NOW + 7200)
MOMENTS = [
    case("long before its end", NOW + 3600, "at-1", []),
    case("61 s before its end", NOW + 61, "at-1", []),
    case("60 s before its end (S1-R14)", NOW + 60, "at-2", ["at-1"]),
    case("after its end", NOW - 1, "at-2", ["at-1"]),
    case("an end in 1970", 0.0, "at-2", ["at-1"]),
    case("no end", None, "at-1", []),
]


@pytest.mark.parametrize(("expires_at", "token", "asked"), MOMENTS)
def test_token_is_renewed_shortly_before_its_end(
    expires_at: Optional[float], token: str, asked: List[str]
) -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", expires_at), LATER)
    credential = shim.Renewed(source, world())
    assert credential.authorization({}) == shown(token)
    assert credential.authorization({}) == shown(token)
    assert source.asked == asked


def test_token_that_has_to_be_renewed_is_not_ready_for_a_thread_that_must_not_wait() -> None:
    there = World()
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 62), LATER)
    credential = shim.Renewed(source, there.outside)
    ready = []
    for _ in range(3):
        ready.append(credential.ready())
        there.clock.now += 1
    assert ready == [True, False, False]
    assert shim.APIKey("k", "the test").ready()


def test_clock_that_jumps_costs_one_renewal_at_most() -> None:
    there = World()
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 3600), shim.Bundle("at-2", "", NOW + 1e7))
    credential = shim.Renewed(source, there.outside)
    there.clock.now = NOW + 86_400
    assert credential.authorization({}) == shown("at-2")
    there.clock.now = NOW - 86_400
    assert credential.authorization({}) == shown("at-2")
    assert source.asked == ["at-1"]


def in_parallel(count: int, work: Callable[[int], Any]) -> List[Any]:
    """What `work` returns in as many threads, which start together."""
    barrier = threading.Barrier(count)
    results: List[Any] = [None] * count

    def run(number: int) -> None:
        barrier.wait(PATIENCE)
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    return results


def test_hundred_threads_that_meet_an_expired_token_renew_it_once_s1_r15() -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW - 1), LATER)
    credential = shim.Renewed(source, world())
    assert in_parallel(100, lambda _: credential.authorization({})) == [shown("at-2")] * 100
    assert source.asked == ["at-1"]


def test_hundred_threads_whose_token_was_refused_renew_it_once_s1_r16() -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 3600), LATER)
    credential = shim.Renewed(source, world())
    refused = credential.authorization({})
    results = in_parallel(100, lambda _: credential.authorization({}, refused))
    assert results == [shown("at-2")] * 100
    assert source.asked == ["at-1"]


def test_refusal_of_an_older_token_says_nothing_of_the_newer() -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 3600), LATER)
    credential = shim.Renewed(source, world())
    assert credential.authorization({}, shown("at-0")) == shown("at-1")
    assert source.asked == []


def test_token_that_is_refused_right_after_its_renewal_is_not_renewed_again() -> None:
    """The fault lies elsewhere, and the endpoint answers 429 when it is hammered."""
    there = World()
    source = Rotating(shim.Bundle("at-1", "", NOW + 3600), LATER, shim.Bundle("at-3", "", None))
    credential = shim.Renewed(source, there.outside)
    assert credential.authorization({}, shown("at-1")) == shown("at-2")
    assert credential.authorization({}, shown("at-2")) == shown("at-2")
    there.clock.now += 31
    assert credential.authorization({}, shown("at-2")) == shown("at-3")


def test_token_that_is_still_good_is_used_while_another_thread_renews_it() -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 30), LATER)
    source.gate.clear()
    credential = shim.Renewed(source, world())
    renewing = threading.Thread(target=credential.authorization, args=({},))
    renewing.start()
    assert source.entered.wait(PATIENCE)
    assert credential.authorization({}) == shown("at-1")
    source.gate.set()
    renewing.join(PATIENCE)
    assert credential.authorization({}) == shown("at-2")


def test_renewal_that_fails_is_tried_later_and_the_old_token_serves_while_it_is_good() -> None:
    there = World()
    down = shim.CredentialUnavailableError("h.example is down")
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 50), down, down, LATER)
    credential = shim.Renewed(source, there.outside)
    assert [credential.authorization({}) for _ in range(3)] == [shown("at-1")] * 3
    assert source.asked == ["at-1"]
    there.clock.now += 5
    assert credential.authorization({}) == shown("at-1")
    assert there.told == [
        "warning: h.example is down; next try in 5 s",
        "warning: h.example is down; next try in 10 s",
    ]
    there.clock.now += 9
    assert credential.authorization({}) == shown("at-1")
    there.clock.now += 1
    assert credential.authorization({}) == shown("at-2")
    assert source.asked == ["at-1", "at-1", "at-1"]


def test_expired_token_that_cannot_be_renewed_now_is_503_with_retry_after() -> None:
    there = World()
    down = shim.CredentialUnavailableError("h.example is down", 20.0)
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW - 1), down)
    credential = shim.Renewed(source, there.outside)
    for waited, left in ((0, "20"), (15, "5")):
        there.clock.now = NOW + waited
        with pytest.raises(shim.CredentialUnavailableError) as caught:
            credential.authorization({})
        told = (caught.value.status, caught.value.message, caught.value.headers)
        assert told == (503, "h.example is down", [("retry-after", left)])
    assert source.asked == ["at-1"]


def test_retry_after_of_the_endpoint_is_obeyed_and_our_own_waits_have_an_end() -> None:
    there = World()
    source = Rotating(
        shim.Bundle("at-1", "rt-1", NOW - 1),
        shim.CredentialUnavailableError("too many requests", 3600.0),
        *[shim.CredentialUnavailableError("down")] * 8,
    )
    credential = shim.Renewed(source, there.outside)
    for seconds in (0, 3599, 1, *[300] * 7):
        there.clock.now += seconds
        with pytest.raises(shim.CredentialUnavailableError):
            credential.authorization({})
    assert [line.partition("; ")[2] for line in there.told] == [
        f"next try in {wait} s" for wait in (3600, 10, 20, 40, 80, 160, 300, 300, 300)
    ]


def test_clock_that_is_set_back_does_not_stretch_the_wait() -> None:
    there = World()
    down = shim.CredentialUnavailableError("h.example is down")
    source = Rotating(shim.Bundle("at-1", "rt-1", 0.0), down, LATER)
    credential = shim.Renewed(source, there.outside)
    with pytest.raises(shim.CredentialUnavailableError):
        credential.authorization({})
    there.clock.now -= 86_400
    assert credential.authorization({}) == shown("at-2")


def test_timer_renews_a_token_that_nobody_asks_for_and_ends_with_the_credential() -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", time.time() + 60.2), LATER)
    told: List[str] = []
    outside = shim.Outside(TokenEndpoint(), told.append)
    credential = shim.Renewed(source, outside)
    credential.start()
    assert source.entered.wait(PATIENCE)
    credential.close()
    assert (source.asked, told) == (["at-1"], [])
    assert credential.describe().expires_at == NOW + 7200


# --- logins in files


def login_file(folder: Path, expires_at: Any = 0, **more: Any) -> str:
    """A login that has to be renewed."""
    login = {"access_token": "at-1", "refresh_token": "rt-1", "expires_at": expires_at, **more}
    return secret_file(folder / "oauth.json", json.dumps(login))


def renewed_from(path: str, there: World) -> shim.Renewed:
    client = shim.OAuthClient(("https://h.example/token",))
    return shim.Renewed(shim.BundleFile(path, client, there.outside), there.outside)


def test_login_is_renewed_and_written_before_it_is_used(tmp_path: Path) -> None:
    path = login_file(tmp_path, note="kept")
    there = World(in_tokens("at-2", "rt-2", 28_800))
    assert renewed_from(path, there).authorization({}) == shown("at-2")
    assert [request.fields for request in there.endpoint.requests] == [
        {
            "grant_type": "refresh_token",
            "refresh_token": "rt-1",
            "client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        }
    ]
    assert json.loads(Path(path).read_text()) == {
        "access_token": "at-2",
        "refresh_token": "rt-2",
        "expires_at": 1_795_328_800,
        "note": "kept",
    }
    assert os.name == "nt" or os.stat(path).st_mode & 0o777 == 0o600
    assert set(there.hidden) == {"at-1", "rt-1", "at-2", "rt-2"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["oauth.json", "oauth.json.lock"]


def test_answer_without_a_refresh_token_keeps_the_old_one(tmp_path: Path) -> None:
    path = login_file(tmp_path)
    renewed_from(path, World(in_tokens("at-2", None))).authorization({})
    assert json.loads(Path(path).read_text())["refresh_token"] == "rt-1"


def test_what_another_process_wrote_is_adopted_s1_b3(tmp_path: Path) -> None:
    path = login_file(tmp_path)
    first, second = World(in_tokens("at-2")), World(in_tokens("never"))
    one, other = renewed_from(path, first), renewed_from(path, second)
    assert one.authorization({}) == shown("at-2")
    assert other.authorization({}) == shown("at-2")
    assert (len(first.endpoint.requests), len(second.endpoint.requests)) == (1, 0)


def test_newest_refresh_token_of_the_file_is_used_when_its_token_has_ended_too(
    tmp_path: Path,
) -> None:
    path = login_file(tmp_path)
    there = World(in_tokens("at-3"))
    credential = renewed_from(path, there)
    login_file(tmp_path, access_token="at-2", refresh_token="rt-2")
    assert credential.authorization({}) == shown("at-3")
    assert there.endpoint.requests[0].fields["refresh_token"] == "rt-2"


def test_void_login_is_asked_for_once_and_works_again_after_a_new_one(tmp_path: Path) -> None:
    path = login_file(tmp_path)
    there = World(no_tokens(400, {"error": "invalid_grant"}))
    credential = renewed_from(path, there)
    for _ in range(2):
        with pytest.raises(shim.CredentialError) as caught:
            credential.authorization({})
        assert caught.value.message == (
            f"the login of {path} is no longer valid: run `claude_shim login`"
        )
    assert len(there.endpoint.requests) == 1
    assert json.loads(Path(path).read_text())["refresh_token"] == "rt-1"
    login_file(tmp_path, NOW + 3600, access_token="at-9", refresh_token="rt-9")
    assert credential.authorization({}) == shown("at-9")


def test_refused_login_is_read_again_for_a_program_without_our_lock(tmp_path: Path) -> None:
    path = login_file(tmp_path)
    there = World()

    def post(request: shim.TokenRequest) -> shim.TokenAnswer:
        login_file(tmp_path, NOW + 3600, access_token="at-2", refresh_token="rt-2")
        return shim.TokenAnswer(400, [], b'{"error": "invalid_grant"}')

    outside = there.outside._replace(post=post)
    credential = shim.Renewed(shim.BundleFile(path, shim.OAuthClient(), outside), outside)
    assert credential.authorization({}) == shown("at-2")


def test_what_a_killed_process_wrote_is_put_in_place_by_the_next(tmp_path: Path) -> None:
    path = login_file(tmp_path)
    login = {"access_token": "at-2", "refresh_token": "rt-2", "expires_at": NOW + 3600}
    there = World(in_tokens("never"))
    credential = renewed_from(path, there)
    secret_file(tmp_path / "oauth.json.new", json.dumps(login))
    assert credential.authorization({}) == shown("at-2")
    assert there.endpoint.requests == []
    assert json.loads(Path(path).read_text()) == login
    assert not (tmp_path / "oauth.json.new").exists()


@pytest.mark.parametrize("removed", [False, True])
def test_what_a_killed_process_wrote_is_not_put_over_something_later(
    tmp_path: Path, removed: bool
) -> None:
    path = login_file(tmp_path)
    new = secret_file(tmp_path / "oauth.json.new", '{"access_token": "stale"}')
    os.utime(new, (5, 5))
    if removed:
        os.unlink(path)
    shim.finish_write(path, shim.parsed_bundle)
    assert os.path.exists(path) is not removed
    assert removed or json.loads(Path(path).read_text())["access_token"] == "at-1"


def test_half_of_what_a_killed_process_wrote_is_overwritten(tmp_path: Path) -> None:
    path = login_file(tmp_path)
    secret_file(tmp_path / "oauth.json.new", '{"access_token": "at-')
    assert renewed_from(path, World(in_tokens("at-2"))).authorization({}) == shown("at-2")
    assert json.loads(Path(path).read_text())["access_token"] == "at-2"
    assert not (tmp_path / "oauth.json.new").exists()


def test_login_that_is_gone_is_told_with_the_command_that_makes_one(tmp_path: Path) -> None:
    path = login_file(tmp_path)
    credential = renewed_from(path, World(in_tokens("never")))
    os.unlink(path)
    with pytest.raises(shim.CredentialError) as caught:
        credential.authorization({})
    assert caught.value.message == (
        f"cannot read {path}: No such file or directory; run `claude_shim login`"
    )


def test_login_without_a_refresh_token_says_so_when_it_ends(tmp_path: Path) -> None:
    path = login_file(tmp_path, refresh_token="")
    with pytest.raises(shim.CredentialError) as caught:
        renewed_from(path, World(in_tokens("never"))).authorization({})
    assert caught.value.message == f"{path} cannot be renewed: run `claude_shim login`"


def test_token_that_cannot_be_written_serves_and_nobody_else_may_renew_meanwhile(
    tmp_path: Path,
) -> None:
    """On a full disk the file still holds a spent refresh token: using that would end the login."""
    path = login_file(tmp_path)
    there = World(in_tokens("at-2"))
    there.full = True
    client = shim.OAuthClient(("https://h.example/token",))
    source = shim.BundleFile(path, client, there.outside)
    credential = shim.Renewed(source, there.outside)
    assert credential.authorization({}) == shown("at-2")
    assert json.loads(Path(path).read_text())["refresh_token"] == "rt-1"
    told = f"error: the renewed login cannot be written to {path}: No space left on device; "
    assert there.told == [
        f"{told}it lives in this process only, and is lost when that ends: mend it soon"
    ]
    with pytest.raises(shim.CredentialUnavailableError) as caught:
        shim.lock_file(f"{path}.lock", 0.01)
    assert caught.value.message == f"another process does not let go of {path}.lock"
    with pytest.raises(shim.ConfigError, match="is not on the disk yet"):
        credential.settle()
    assert len(there.told) == 1  # once is enough
    there.full = False
    credential.close()
    assert json.loads(Path(path).read_text())["refresh_token"] == "rt-2"
    lock = shim.lock_file(f"{path}.lock", 0.01)
    assert lock is not None
    os.close(lock)


def test_read_only_folder_is_a_warning_at_the_start_and_no_crash_at_the_renewal(
    tmp_path: Path,
) -> None:
    path = login_file(tmp_path)
    os.chmod(tmp_path, 0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("root may write everywhere")
        there = World(in_tokens("at-2"))
        credential = renewed_from(path, there)
        assert there.told[0].startswith(f"warning: {tmp_path} is read-only: ")
        assert credential.authorization({}) == shown("at-2")
    finally:
        os.chmod(tmp_path, 0o700)


def test_lock_of_a_folder_that_takes_no_files_is_none(tmp_path: Path) -> None:
    assert shim.lock_file(str(tmp_path / "missing" / "f.lock"), 0.01) is None


def test_lock_that_is_another_users_is_told_and_not_done_without(tmp_path: Path) -> None:
    (tmp_path / "f.lock").mkdir()
    with pytest.raises(shim.CredentialUnavailableError) as caught:
        shim.lock_file(str(tmp_path / "f.lock"), 0.01)
    assert caught.value.message.startswith(f"cannot open {tmp_path}/f.lock: ")


# --- many processes, one login


class RotatingLogin:
    """A token endpoint on a socket whose refresh tokens work once: a second use ends the login.

    It knows who got which token, by the process that asked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refreshes = 0
        self.reuses: List[str] = []  # that nothing excuses
        self.orphans: Set[str] = set()  # whose successor went to a process that was killed
        self.killed: Set[int] = set()
        self._valid = ""
        self._owners: Dict[str, int] = {}  # spent refresh token -> who got the one after it
        self._lock = threading.Lock()
        login = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, answer = login.answer(body["refresh_token"], int(self.headers["x-pid"]))
                raw = json.dumps(answer).encode()
                head = f"HTTP/1.1 {status} -\r\ncontent-length: {len(raw)}\r\n\r\n"
                with contextlib.suppress(OSError):
                    self.wfile.write(head.encode() + raw)  # two writes would wait for an ACK

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/token"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def fresh_login(self) -> str:
        """The text of a new login that has to be renewed at once."""
        with self._lock:
            self._valid = f"rt-{secrets.token_hex(8)}"
            return json.dumps({"access_token": "at", "refresh_token": self._valid, "expires_at": 1})

    def answer(self, token: str, pid: int) -> Tuple[int, JSON]:
        with self._lock:
            if token != self._valid:
                unsaved = json.loads(self.path.read_text())["refresh_token"] == token
                if self._owners.get(token) in self.killed and unsaved:
                    self.orphans.add(token)  # no program could have saved it
                else:
                    self.reuses.append(f"{token} of {self._owners.get(token)} by {pid}")
                self._valid = ""
                return 400, {"error": "invalid_grant"}
            self.refreshes += 1
            self._owners[token] = pid
            self._valid = f"rt-{secrets.token_hex(8)}"
            access = f"at-{self.refreshes}"
            return 200, {"access_token": access, "refresh_token": self._valid, "expires_in": 120}


# A process that uses a login until its standard input ends. Its clock runs 2,000 times as fast, so
# that a token of two minutes is due after 30 ms. With "full", two writes in three meet a full disk.
STORM_PROCESS = """
import os, random, resource, sys, threading, time
import claude_shim as shim
path, url, started, full = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4] == "full"
settings = shim.settings_from(shim.argument_parser().parse_args([]), {}, {})
ask = shim.token_post(settings)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
def post(request):
    return ask(request._replace(headers=[("x-pid", str(os.getpid()))]))
def save(path, text):
    limit = 10 if full and not ended.is_set() and random.random() < 0.66 else -1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    shim.write_secret_file(path, text)
shim.Renewed.TICK = 0.05
clock = lambda: started + (time.time() - started) * 2000
outside = shim.Outside(post, clock=clock, save=save)
source = shim.BundleFile(path, shim.OAuthClient((url,)), outside)
credential = shim.Renewed(source, outside)
credential.start()
while not ended.wait(0.005):
    try:
        credential.authorization({})
    except (shim.CredentialError, shim.CredentialUnavailableError):
        pass
credential.close()
"""


class Storm(NamedTuple):
    """What came of many processes that share a login."""

    refreshes: int
    reuses: List[str]
    logins: int  # that had to be made: the first, and one for each token that a kill orphaned
    orphans: int
    kills: int
    valid: bool  # whether the file holds a login at the end that can be renewed


def storm(folder: Path, processes: int, refreshes: int, kills: bool, disk: str = "fine") -> Storm:
    """Have processes use one login until it was renewed so many times."""
    path, chance = folder / "oauth.json", random.Random(4)
    login = RotatingLogin(path)
    logins, killed, killed_at, started = 0, 0, 1, str(time.time())
    command = [sys.executable, "-B", "-c", STORM_PROCESS, str(path), login.url, started, disk]
    running: List[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + 60 + refreshes
    environment = {**os.environ, "PYTHONPATH": str(MODULE_FILE.parent)}
    with login.serving():
        try:
            while login.refreshes < refreshes and time.monotonic() < deadline:
                if not login._valid:
                    lock = shim.lock_file(f"{path}.lock")
                    assert lock is not None
                    shim.write_secret_file(str(path), login.fresh_login())
                    os.close(lock)
                    logins += 1
                shim.parsed_bundle(shim.read_secret_file(str(path)), "a torn file")
                while len(running) < processes:
                    running.append(
                        subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
                    )
                select.select([], [], [], chance.uniform(0.01, 0.2))
                if kills and login.refreshes >= killed_at + 2:
                    victim = running.pop(chance.randrange(len(running)))
                    login.killed.add(victim.pid)
                    victim.kill()
                    victim.communicate()
                    killed, killed_at = killed + 1, login.refreshes
        finally:
            for process in running:
                process.communicate(timeout=30)
        last = shim.parsed_bundle(shim.read_secret_file(str(path)), "a torn file")
        valid = last.refresh_token == login._valid
    return Storm(login.refreshes, login.reuses, logins, len(login.orphans), killed, valid)


@ON_POSIX
@pytest.mark.parametrize("disk", ["fine", "full"])
def test_processes_that_share_a_login_never_use_a_refresh_token_twice_s1_b3(
    tmp_path: Path, disk: str
) -> None:
    """`.ci/check_refresh.py` does it with more of them, for longer, and with kill -9."""
    came = storm(tmp_path, 2, 6, False, disk)
    assert came.refreshes >= 6
    assert (came.reuses, came.logins, came.valid) == ([], 1, True)


# --- other sources


def test_workload_identity_exchanges_the_token_of_its_platform() -> None:
    identities = ["jwt-1\n", "jwt-2"]
    there = World(in_tokens("sk-ant-oat01-a", "not used", 600), in_tokens("sk-ant-oat01-b"))
    fields = {"federation_rule_id": "fdrl_1", "organization_id": "org_1"}
    client = shim.OAuthClient(("https://h.example/v1/oauth/token",))
    source = shim.Federation(client, fields, lambda: identities.pop(0), there.outside)
    credential = shim.Renewed(source, there.outside)
    assert credential.authorization({}) == shown("sk-ant-oat01-a")
    there.clock.now += 541
    assert credential.authorization({}) == shown("sk-ant-oat01-b")
    grant = "urn:ietf:params:oauth:grant-type:jwt-bearer"
    assert [(request.fields, request.headers) for request in there.endpoint.requests] == [
        (
            {"grant_type": grant, "assertion": assertion, **fields},
            [("anthropic-beta", "oauth-2025-04-20,oidc-federation-2026-04-01")],
        )
        for assertion in ("jwt-1", "jwt-2")
    ]
    assert there.hidden == [
        "jwt-1",
        "sk-ant-oat01-a",
        "not used",
        "jwt-2",
        "sk-ant-oat01-b",
        "rt-2",
    ]


BAD_IDENTITIES = [
    case("none", "", "the key from the identity token is empty"),
    case("refused", "jwt", VOID),
]


@pytest.mark.parametrize(("identity", "message"), BAD_IDENTITIES)
def test_bad_identity_is_tried_again_later(identity: str, message: str) -> None:
    there = World(no_tokens(400, {"error": "invalid_grant"}))
    client = shim.OAuthClient(("https://h.example/v1/oauth/token",))
    source = shim.Federation(client, {}, lambda: identity, there.outside)
    with pytest.raises(shim.CredentialUnavailableError) as caught:
        shim.Renewed(source, there.outside).authorization({})
    assert (caught.value.message, caught.value.seconds) == (message, 30.0)


HELPED = [
    case("an API key", "sk-ant-api03-h\n", [("x-api-key", "sk-ant-api03-h")]),
    case("an OAuth token", "sk-ant-oat01-h", shown("sk-ant-oat01-h")),
    case("a token of a gateway", " jwt.h \r\n", [("authorization", "Bearer jwt.h")]),
]


@pytest.mark.parametrize(("printed", "expected"), HELPED)
def test_helper_prints_a_key_which_is_kept_for_a_while(printed: str, expected: Any) -> None:
    ran: List[Sequence[str]] = []

    def run(command: Sequence[str]) -> Tuple[int, str]:
        ran.append(command)
        return 0, printed

    there = World(run=run)
    credential = shim.Renewed(shim.Helper("pass show key", 300.0, there.outside), there.outside)
    for second in (0, 299, 300):
        there.clock.now = NOW + second
        assert credential.authorization({}) == expected
    assert [list(command)[-1] for command in ran] == ["pass show key"] * 2
    assert there.hidden == [printed.strip()] * 2


def run_of(code: int, output: str) -> Callable[[Sequence[str]], Tuple[int, str]]:
    return lambda command: (code, output)


def run_without_end(command: Sequence[str]) -> Tuple[int, str]:
    raise TimeoutError("no answer within 30 seconds")


BAD_HELPERS = [
    case("it fails", run_of(3, "hunter2"), "it ended with code 3"),
    case("it prints nothing", run_of(0, "\n"), "the key from it is empty"),
    case(
        "it prints two words",
        run_of(0, "key: hunter2"),
        "the key from it holds white space or characters beyond ASCII",
    ),
    case("it does not end", run_without_end, "no answer within 30 seconds"),
]


@pytest.mark.parametrize(("run", "reason"), BAD_HELPERS)
def test_helper_that_gives_no_key(run: Any, reason: str) -> None:
    there = World(run=run)
    with pytest.raises(shim.CredentialUnavailableError) as caught:
        shim.Renewed(shim.Helper("x", 300.0, there.outside), there.outside).authorization({})
    assert caught.value.message == f"--key-helper gave no key: {reason}"


@ON_POSIX
def test_program_is_killed_with_those_it_started_when_time_is_up(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # ends when no child holds it open
    try:
        command = ["/bin/sh", "-c", f"(sleep 60; echo late) 9>{fifo} & wait"]
        with pytest.raises(TimeoutError) as caught:
            shim.run_program(command, 0.5)
        assert str(caught.value) == "no answer within 0.5 seconds"
        assert select.select([reading], [], [], PATIENCE)[0] == [reading]
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)


@ON_POSIX
@pytest.mark.parametrize(
    ("script", "told"),
    [
        case("endless output", "yes hunter2", "more than 1048576 bytes came"),
        case("a closed output", "exec >&-; sleep 60", "no answer within 0.5 seconds"),
        case("a child that keeps it", "sleep 60 & echo hunter2", "no answer within 0.5 seconds"),
    ],
)
def test_program_that_gives_no_end_is_killed(script: str, told: str) -> None:
    with pytest.raises(OSError, match=f"^{told}$"):
        shim.run_program(["/bin/sh", "-c", script], 0.5)


@ON_POSIX
def test_output_of_a_program_has_a_limit_that_a_login_fits_in() -> None:
    code, output = shim.run_program(["/bin/sh", "-c", "head -c 1048576 /dev/zero; exit 3"])
    assert (code, output) == (3, "\0" * 1048576)


@ON_POSIX
def test_program_gets_no_secret_in_its_environment() -> None:
    code, output = shim.run_program([sys.executable, "-c", "print(5); raise SystemExit(7)"])
    assert (code, output) == (7, "5\n")
    environment = {"PATH": "/bin", "ANTHROPIC_API_KEY": "k", "claude_code_oauth_token": "t"}
    assert shim.without_secrets(environment) == {"PATH": "/bin"}
    ran = subprocess.run(
        [sys.executable, "-B", "-c", "import claude_shim as s; print(s.run_program(['env'])[1])"],
        env={**os.environ, **environment, "PYTHONPATH": str(MODULE_FILE.parent), "KEPT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "KEPT=1\n" in ran.stdout
    assert "ANTHROPIC_API_KEY" not in ran.stdout


@ON_POSIX
def test_browser_gets_no_secret_in_its_environment(tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text("#!/bin/sh\necho $1 with ${ANTHROPIC_API_KEY:-no key}\n")
    browser.chmod(0o700)
    code = "import os, claude_shim as s; s.Terminal({'BROWSER': 'b'}).browse('https://page')"
    ran = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={
            "PATH": "/bin:/usr/bin",
            "PYTHONPATH": str(MODULE_FILE.parent),
            "BROWSER": f"{browser} %s",
            "ANTHROPIC_API_KEY": "sk-ant-api03-x",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "https://page with no key\n"


def claude_code_login(token: str, expires_at: float = NOW * 1000 + 3_600_000) -> str:
    return json.dumps(
        {
            "claudeAiOauth": {
                "accessToken": token,
                "refreshToken": "sk-ant-ort01-of-claude-code",
                "expiresAt": expires_at,
                "scopes": ["user:inference"],
            },
            "mcpOAuth": {},
        }
    )


def test_login_of_claude_code_is_read_again_and_never_renewed(tmp_path: Path) -> None:
    path = secret_file(tmp_path / ".credentials.json", claude_code_login("sk-ant-oat01-1"))
    there = World()
    credential = shim.Renewed(shim.ClaudeCode(path, "", there.outside), there.outside)
    assert credential.authorization({}) == shown("sk-ant-oat01-1")
    there.clock.now += 3600
    before = Path(path).read_text()
    with pytest.raises(shim.CredentialError) as caught:
        credential.authorization({})
    assert caught.value.message == (
        "the login of Claude Code has ended: run `claude`, which renews it"
    )
    assert Path(path).read_text() == before
    secret_file(tmp_path / ".credentials.json", claude_code_login("sk-ant-oat01-2", 9e12))
    assert credential.authorization({}) == shown("sk-ant-oat01-2")
    assert (there.endpoint.requests, there.told) == ([], [])


KEYCHAINS = [
    case("JSON", run_of(0, claude_code_login("sk-ant-oat01-k") + "\n"), "sk-ant-oat01-k"),
    case(
        "JSON in hexadecimal",
        run_of(0, claude_code_login("sk-ant-oat01-k").encode().hex() + "\n"),
        "sk-ant-oat01-k",
    ),
    case("no entry: then the file", run_of(44, ""), "sk-ant-oat01-file"),
]


@pytest.mark.parametrize(("run", "token"), KEYCHAINS)
def test_login_of_claude_code_in_the_keychain(tmp_path: Path, run: Any, token: str) -> None:
    path = secret_file(tmp_path / "f", claude_code_login("sk-ant-oat01-file"))
    there = World(run=run)
    source = shim.ClaudeCode(path, "Claude Code-credentials", there.outside)
    assert shim.Renewed(source, there.outside).authorization({}) == shown(token)


def test_locked_keychain_is_told_with_the_command_that_opens_it(tmp_path: Path) -> None:
    there = World(run=run_of(36, ""))
    with pytest.raises(shim.ConfigError) as caught:
        shim.ClaudeCode(str(tmp_path), "Claude Code-credentials", there.outside).current()
    assert str(caught.value) == "the keychain is locked: run `security unlock-keychain` first"


def test_keychain_service_depends_on_the_folder() -> None:
    assert shim.keychain_service("") == "Claude Code-credentials"
    assert shim.keychain_service("/tmp/x") == "Claude Code-credentials-2e56aa36"
    assert shim.keychain_service("/tmp/e\u0301") == shim.keychain_service("/tmp/\u00e9")


# --- keys


WRONG_KEYS = [
    case(
        "an OAuth token", "sk-ant-oat01-x", "is an OAuth token: give it as CLAUDE_CODE_OAUTH_TOKEN"
    ),
    case("a refresh token", "sk-ant-ort01-x", "is a refresh token, which is no key"),
    case("an admin key", "sk-ant-admin01-x", "is an admin key, which may not run models"),
]


@pytest.mark.parametrize(("key", "reason"), WRONG_KEYS)
def test_other_kind_of_key_is_refused_with_what_it_is(key: str, reason: str) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        shim.checked_api_key(key, "FILE")
    assert str(caught.value).startswith(f"the key from FILE {reason}")
    assert "sk-ant-o" not in str(caught.value).replace(reason, "")


LONG_ENOUGH = "sk-ant-oat01-" + "x" * 67
SETUP_TOKENS = [
    case("as it should be", LONG_ENOUGH, ""),
    case(
        "short (S1-R7)",
        LONG_ENOUGH[:-1],
        "the setup token from FILE has 79 characters of at least 80: is it cut off? "
        "(--allow-odd-token takes it all the same)",
    ),
    case(
        "another key",
        "sk-ant-api03-" + "x" * 90,
        "the setup token from FILE does not begin with sk-ant-oat "
        "(--allow-odd-token takes it all the same)",
    ),
]


@pytest.mark.parametrize(("token", "message"), SETUP_TOKENS)
def test_setup_token_is_checked_and_the_check_can_be_overruled_s1_b9(
    token: str, message: str
) -> None:
    assert shim.checked_setup_token(token, "FILE", True) == token
    if not message:
        assert shim.checked_setup_token(token, "FILE") == token
        return
    with pytest.raises(shim.ConfigError) as caught:
        shim.checked_setup_token(token, "FILE")
    assert str(caught.value) == message


MERGED = [
    case("a key alone", [("a", "1")], [("x-api-key", "k")], [("a", "1"), ("x-api-key", "k")]),
    case(
        "the client's betas come first, none twice (S1-B1)",
        [("anthropic-beta", "one, oauth-2025-04-20"), ("anthropic-beta", "two")],
        [("authorization", "Bearer t"), ("anthropic-beta", "oauth-2025-04-20")],
        [("authorization", "Bearer t"), ("anthropic-beta", "one,oauth-2025-04-20,two")],
    ),
    case(
        "without need the client's list stays to the byte (D2)",
        [("anthropic-beta", "one,  two")],
        [("x-api-key", "k")],
        [("anthropic-beta", "one,  two"), ("x-api-key", "k")],
    ),
    case(
        "what belongs to the credential is not the client's to say",
        [("anthropic-workspace-id", "wrkspc_theirs")],
        [("authorization", "Bearer t"), ("anthropic-workspace-id", "wrkspc_ours")],
        [("authorization", "Bearer t"), ("anthropic-workspace-id", "wrkspc_ours")],
    ),
]


@pytest.mark.parametrize(("headers", "authorization", "expected"), MERGED)
def test_headers_of_a_credential_join_those_of_a_request(
    headers: Any, authorization: Any, expected: Any
) -> None:
    assert shim.with_authorization(headers, authorization) == expected


# --- keys of clients
CLIENT_KEYS = shim.ClientKeys({"ann": "key-of-ann", "bob": "key-of-bob"})

SHOWN_KEYS = [
    case("Authorization: Bearer", {"authorization": "Bearer key-of-ann"}, "ann"),
    case("Bearer in any case (S3-B26)", {"authorization": "bEARER key-of-bob"}, "bob"),
    case("Bearer with more white space", {"authorization": "Bearer   key-of-ann "}, "ann"),
    case("x-api-key (S3-B26)", {"x-api-key": "key-of-ann"}, "ann"),
    case("api-key, as Azure's clients send it", {"api-key": "key-of-bob"}, "bob"),
    case("x-claude-shim-key", {"x-claude-shim-key": "key-of-ann"}, "ann"),
    case(
        "a right one beside a wrong one, as Continue sends both",
        {"authorization": "Bearer anything", "x-api-key": "key-of-ann"},
        "ann",
    ),
]


@pytest.mark.parametrize(("client", "name"), SHOWN_KEYS)
def test_client_key_is_found(client: Dict[str, str], name: str) -> None:
    assert CLIENT_KEYS.name_of(client) == name


REFUSED_KEYS = [
    case("none at all", {}, "missing"),
    case("an empty bearer", {"authorization": "Bearer "}, "missing"),
    case("Basic", {"authorization": "Basic key-of-ann"}, "missing"),
    case("no scheme", {"authorization": "key-of-ann"}, "missing"),
    case("a wrong one", {"x-api-key": "key-of-eve"}, "wrong"),
    case("a beginning of one", {"x-api-key": "key-of-an"}, "wrong"),
    case("a longer one", {"x-api-key": "key-of-ann2"}, "wrong"),
    case("another case", {"x-api-key": "KEY-OF-ANN"}, "wrong"),
    case("the name of a key", {"x-api-key": "ann"}, "wrong"),
    case("Latin-1, which must not crash the comparison (S2-B2)", {"x-api-key": "k\xe9"}, "wrong"),
    case("beyond Latin-1", {"authorization": "Bearer \u4e16"}, "wrong"),
    case("half a surrogate pair", {"api-key": "\ud83d"}, "wrong"),
]


@pytest.mark.parametrize(("client", "reason"), REFUSED_KEYS)
def test_client_key_is_refused_with_401_s4_b4(client: Dict[str, str], reason: str) -> None:
    with pytest.raises(shim.AuthenticationError) as caught:
        CLIENT_KEYS.name_of(client)
    assert caught.value.status == 401
    assert caught.value.message == (
        f"The client key is {reason}: send the key of this claude_shim as "
        "Authorization: Bearer, x-api-key or api-key."
    )


@pytest.mark.parametrize("client", [{}, {"authorization": "Bearer anything"}])
def test_without_client_keys_every_caller_is_taken(client: Dict[str, str]) -> None:
    assert not shim.ClientKeys()
    assert shim.ClientKeys().name_of(client) == ""


KEY_FILES = [
    case("one key", "k1\n", {"line 1": "k1"}),
    case("a name before it", "ann k1\nbob\tk2", {"ann": "k1", "bob": "k2"}),
    case(
        "comments, empty lines, CRLF and indentation",
        "# keys\r\n\r\n  k1\r\n  # more\r\nbob k2\r\n",
        {"line 3": "k1", "bob": "k2"},
    ),
]


@pytest.mark.parametrize(("text", "expected"), KEY_FILES)
def test_client_key_file(text: str, expected: Dict[str, str]) -> None:
    assert shim.parsed_client_keys(text, "keys.txt") == expected


BAD_KEY_FILES = [
    case("empty", "", "keys.txt holds no key"),
    case("comments only", "# none\n\n", "keys.txt holds no key"),
    case(
        "three words",
        "k1\nann k2 k3\n",
        "keys.txt, line 2: expected a key, or a name and a key",
    ),
    case(
        "a key that no header can hold",
        "ann k\xe9y",
        "the key from keys.txt, line 1 holds white space or characters beyond ASCII",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_KEY_FILES)
def test_client_key_file_refused(text: str, message: str) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        shim.parsed_client_keys(text, "keys.txt")
    assert str(caught.value) == message


def test_key_of_a_name() -> None:
    assert CLIENT_KEYS.key_of("line 9") == "line 9"
    assert shim.ClientKeys({"line 1": "k1"}).key_of("line 1") == "k1"


def test_client_key_file_does_not_lose_a_key_of_a_repeated_name() -> None:
    try:
        keys = shim.ClientKeys(shim.parsed_client_keys("ann k1\nann k2\n", "keys.txt"))
    except shim.ConfigError:
        return  # telling the operator is fine, too
    assert [keys.name_of({"x-api-key": key}) for key in ("k1", "k2")] == ["ann", "ann"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [case("as it is", "sk-1", "sk-1"), case("with a final newline", " sk-1\r\n", "sk-1")],
)
def test_checked_secret(text: str, expected: str) -> None:
    assert shim.checked_secret(text, "the test") == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        case("empty", "", "is empty"),
        case("blank", " \n", "is empty"),
        case("two lines", "sk-1\nsk-2", "holds white space or characters beyond ASCII"),
        case("a space", "sk 1", "holds white space or characters beyond ASCII"),
        case("a control character", "sk\x001", "holds white space or characters beyond ASCII"),
        case(
            "a dash of a word processor",
            "sk\u20131",
            "holds white space or characters beyond ASCII",
        ),
    ],
)
def test_checked_secret_refused_without_showing_it(text: str, reason: str) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        shim.checked_secret(text, "FILE")
    assert str(caught.value) == f"the key from FILE {reason}"


# --- logging in

# The pair of RFC 7636, appendix B.
VERIFIER = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
ATTEMPT = shim.LoginAttempt("http://localhost:5/callback", VERIFIER, "state-of-ours")


def test_login_url_shows_the_challenge_and_a_state_of_its_own() -> None:
    """pi#7515: the verifier was sent along as the state, so the challenge hid nothing."""
    url = ATTEMPT.url("https://claude.example/authorize", "client-1", "user:inference user:profile")
    assert url == (
        "https://claude.example/authorize?code=true&client_id=client-1&response_type=code"
        "&redirect_uri=http%3A%2F%2Flocalhost%3A5%2Fcallback"
        "&scope=user%3Ainference+user%3Aprofile"
        f"&code_challenge={CHALLENGE}&code_challenge_method=S256&state=state-of-ours"
    )
    assert VERIFIER not in url


def test_code_is_exchanged_with_the_verifier() -> None:
    assert ATTEMPT.token_fields("code-1", "client-1") == {
        "grant_type": "authorization_code",
        "code": "code-1",
        "redirect_uri": "http://localhost:5/callback",
        "client_id": "client-1",
        "code_verifier": VERIFIER,
        "state": "state-of-ours",
    }


def test_login_attempt_shows_neither_verifier_nor_state() -> None:
    assert VERIFIER not in repr(ATTEMPT)
    assert "state-of-ours" not in repr(ATTEMPT)


CODES = [
    case("of a callback", "code_called_back", "code=c-1&state=state-of-ours", "c-1"),
    case(
        "of a callback with more in it",
        "code_called_back",
        "scope=a+b&code=c%2F1&state=state-of-ours",
        "c/1",
    ),
    case("of a pasted line", "code_pasted", "c-1#state-of-ours", "c-1"),
    case("of a line pasted with white space", "code_pasted", " c-1#state-of-ours\r\n", "c-1"),
]


@pytest.mark.parametrize(("form", "given", "code"), CODES)
def test_code_of_a_login(form: str, given: str, code: str) -> None:
    assert getattr(ATTEMPT, form)(given) == code


NO_CODES = [
    case("a wrong state", "code_called_back", "code=c-1&state=state-of-others"),
    case("no state (eliza#20507 took it)", "code_called_back", "code=c-1"),
    case("an empty state", "code_called_back", "code=c-1&state="),
    case("a state beyond ASCII", "code_called_back", "code=c-1&state=%E4%B8%96%ff"),
    case("two states", "code_called_back", "code=c-1&state=x&state=state-of-ours"),
    case("two codes", "code_called_back", "code=c-1&code=c-2&state=state-of-ours"),
    case("no code", "code_called_back", "state=state-of-ours"),
    case("a code with a line end", "code_called_back", "code=c%0a1&state=state-of-ours"),
    case("a denial of somebody else", "code_called_back", "error=access_denied&state=x"),
    case("a denial without state", "code_called_back", "error=access_denied"),
    case(
        "a hundred fields",
        "code_called_back",
        "&".join(["code=c-1&state=state-of-ours", *(f"f{n}=1" for n in range(100))]),
    ),
    case("nothing", "code_called_back", ""),
    case("a pasted code alone", "code_pasted", "c-1"),
    case("a pasted line of another login", "code_pasted", "c-1#state-of-others"),
    case("a pasted state alone", "code_pasted", "#state-of-ours"),
    case("a pasted line with half a surrogate pair", "code_pasted", "c-1#\udcff"),
    case("an empty line", "code_pasted", "\n"),
]


@pytest.mark.parametrize(("form", "given"), NO_CODES)
def test_what_does_not_answer_a_login(form: str, given: str) -> None:
    """veryfront#2321, everruns#2447: the state was not compared."""
    with pytest.raises(shim.WrongCallbackError):
        getattr(ATTEMPT, form)(given)


DENIALS = [
    case("with a reason", "error=access_denied", "(access_denied)"),
    case("with an empty reason", "error=", "(no reason given)"),
    case("with a hostile reason", "error=%1b[31ma%0Ab" + "c" * 90, "(mab" + "c" * 37 + ")"),
]


@pytest.mark.parametrize(("query", "reason"), DENIALS)
def test_login_that_was_denied(query: str, reason: str) -> None:
    with pytest.raises(shim.LoginError) as caught:
        ATTEMPT.code_called_back(f"{query}&state=state-of-ours")
    assert str(caught.value) == f"the login was not granted {reason}"


# ----------------------------------------------------------------------
# 9. Upstream over HTTP
# ----------------------------------------------------------------------

PATIENCE = 5.0  # seconds until a test that waits in vain fails
CLOSE = "close"
RESET = "reset"
UNTIL_GONE = "until the client is gone"
EARLY = "answer before the body is read"


class FakeUpstream:
    """An upstream on real sockets: each request plays the next script, the last one again.

    A step of a script is bytes to send, an iterator of bytes, an Event to wait for, or one of the
    words above.
    """

    def __init__(
        self, *scripts: Sequence[Any], tls: Optional[ssl.SSLContext] = None, tunnels: bool = False
    ) -> None:
        self._scripts = [list(script) for script in scripts]
        self._tls = tls
        self._tunnels = tunnels  # takes a CONNECT first, and is then what is behind it
        self._lock = threading.Lock()
        self._sockets: List[socket.socket] = []
        self._threads: List[threading.Thread] = []
        self._stopping = False
        self.requests: List[bytes] = []
        self.asked = threading.Semaphore(0)  # released for each request
        self.stalled = threading.Semaphore(0)  # released each time a script waits
        self.gone = threading.Event()  # set when a client has closed its connection
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"http://{self.host}"
        self._accepting = threading.Thread(target=self._accept)

    @property
    def connections(self) -> int:
        """How many there were."""
        return len(self._sockets)

    def __enter__(self) -> FakeUpstream:
        self._accepting.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stopping = True
        socket.create_connection(self._listener.getsockname(), PATIENCE).close()  # wakes accept
        self._accepting.join()
        self._listener.close()
        for step in [step for script in self._scripts for step in script]:
            if isinstance(step, threading.Event):
                step.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self._stopping:
                sock.close()
                return
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(2 * PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, EOFError):
            stack.enter_context(sock)
            if self._tunnels:
                self.requests.append(self._read(sock, until=b"\r\n\r\n"))
                sock.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            if self._tls:
                sock = stack.enter_context(self._tls.wrap_socket(sock, server_side=True))
            while True:
                head = self._read(sock, until=b"\r\n\r\n")
                with self._lock:
                    script = self._scripts[0]
                    self._scripts = self._scripts[1:] or self._scripts
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)\r\n", head)
                wanted_bytes = int(length.group(1)) if length and EARLY not in script else 0
                self.requests.append(head + self._read(sock, size=wanted_bytes))
                self.asked.release()
                for step in script:
                    self._play(step, sock)

    def _read(self, sock: socket.socket, size: int = 0, until: bytes = b"") -> bytes:
        received = b""
        while len(received) < size or not received.endswith(until):
            burst = self._received(sock, 1 if until else min(1 << 16, size - len(received)))
            received += burst
        return received

    def _received(self, sock: socket.socket, size: int) -> bytes:
        try:
            burst = sock.recv(size)
        except ConnectionError:
            burst = b""
        if not burst:
            self.gone.set()
            raise EOFError
        return burst

    def _play(self, step: Any, sock: socket.socket) -> None:
        if isinstance(step, bytes):
            self._send(step, sock)
        elif isinstance(step, threading.Event):
            self.stalled.release()
            assert step.wait(2 * PATIENCE)
        elif step == UNTIL_GONE:
            self.stalled.release()
            while True:
                self._received(sock, 1 << 16)
        elif step in (CLOSE, RESET):
            if step == RESET:
                reset_on_close(sock)
            raise EOFError
        elif step != EARLY:
            for piece in step:
                self._send(piece, sock)

    def _send(self, piece: bytes, sock: socket.socket) -> None:
        try:
            sock.sendall(piece)
        except ConnectionError:
            self.gone.set()
            raise


def reset_on_close(sock: socket.socket) -> None:
    """Make close send RST: the connection breaks instead of ending."""
    linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def in_chunks(*pieces: bytes) -> bytes:
    """The pieces, a chunk each, without the last one."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


LAST_CHUNK = b"0\r\n\r\n"
FINE_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nrequest-id: req_1\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def http_upstream(url: str, **options: Any) -> Any:
    """An HTTPUpstream that is closed when left; limits are given by name."""
    named = {key: options.pop(key) for key in shim.Limits._fields if key in options}
    return contextlib.closing(shim.HTTPUpstream(url, limits=shim.Limits(**named), **options))


def sent(upstream: shim.Upstream, *headers: Tuple[str, str], **parts: Any) -> shim.UpstreamResponse:
    """Send a POST of `{}`, or of what `parts` says."""
    defaults = {"method": "POST", "path": "/v1/messages", "headers": list(headers), "body": b"{}"}
    return upstream.send(shim.UpstreamRequest(**{**defaults, **parts}))


def read_whole(response: shim.UpstreamResponse) -> bytes:
    """Read a body to its end and let go of it."""
    body = b"".join(shim.pieces_of(response.source))
    response.source.close()
    return body


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        case("a status alone", b"HTTP/1.1 200 OK", (200, [])),
        case("no reason phrase", b"HTTP/1.1 529 ", (529, [])),
        case("not even the space before it", b"HTTP/1.0 204", (204, [])),
        case(
            "names become lower case, values lose blanks around them",
            b"HTTP/1.1 200 OK\r\nContent-Type: \t text/plain \r\nX:",
            (200, [("content-type", "text/plain"), ("x", "")]),
        ),
        case(
            "repeated fields stay apart, in order",
            b"HTTP/1.1 200 OK\r\nA: 1\r\nB: 2\r\na: 3",
            (200, [("a", "1"), ("b", "2"), ("a", "3")]),
        ),
        case(
            "bytes beyond ASCII are taken as Latin-1",
            b"HTTP/1.1 200 \xe9\r\nA: caf\xe9",
            (200, [("a", "caf\xe9")]),
        ),
    ],
)
def test_response_head_is_parsed(head: bytes, expected: Any) -> None:
    assert shim.parsed_response_head(head) == expected


def test_header_lines_that_hold_a_secret_are_not_kept() -> None:
    names = [b"Authorization", b"Proxy-Authorization", b"X-Api-Key", b"api-key", b"Cookie"]
    names += [b"X-Auth-Token", b"CF-Access-Client-Secret", b"apikey", b"Cf-Access-Jwt-Assertion"]
    lines = [name + b": s3cret" for name in (*names, b"Set-Cookie", b"x-claude-shim-key")]
    assert [value for _, value in shim.header_fields(lines)] == ["s3cret"] * 11
    assert not any(b"s3cret" in line for line in shim._KNOWN_FIELDS)


def test_header_lines_are_kept_in_a_bounded_number_and_length() -> None:
    for number in range(5000):
        assert shim.header_fields([b"x-a: %d" % number]) == [("x-a", str(number))]
        shim.header_fields([b"x-b: %d" % number + b"x" * 1000])
    assert 0 < len(shim._KNOWN_FIELDS) <= 1024
    assert max(map(len, shim._KNOWN_FIELDS)) < 200


@pytest.mark.parametrize(
    "head",
    [
        case("nothing", b""),
        case("another protocol", b"SSH-2.0-OpenSSH_9.6"),
        case("another version", b"HTTP/2 200"),
        case("a status of two digits", b"HTTP/1.1 20 OK"),
        case("a status of four digits", b"HTTP/1.1 2000 OK"),
        case("a signed status", b"HTTP/1.1 +20 OK"),
        case("a line without colon", b"HTTP/1.1 200 OK\r\ngarbage"),
        case("a space before the colon", b"HTTP/1.1 200 OK\r\nA : 1"),
        case("a folded line", b"HTTP/1.1 200 OK\r\nA: 1\r\n 2"),
        case("a field without name", b"HTTP/1.1 200 OK\r\n: 1"),
        case("a bare CR", b"HTTP/1.1 200 OK\r\nA: 1\rB: 2"),
        case("a bare LF", b"HTTP/1.1 200 OK\nA: 1"),
        case("a NUL", b"HTTP/1.1 200 OK\r\nA: \x00"),
    ],
)
def test_response_head_that_is_malformed_is_refused(head: bytes) -> None:
    with pytest.raises(shim.UpstreamCutError):
        shim.parsed_response_head(head)


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        case("a length", 200, [("content-length", "5")], (False, 5, True)),
        case("no length: until it closes", 200, [], (False, None, False)),
        case("chunked", 200, [("transfer-encoding", "chunked")], (True, None, True)),
        case("chunked in capitals", 200, [("transfer-encoding", "Chunked")], (True, None, True)),
        case(
            "chunked wins over a length, and the connection is not trusted again",
            200,
            [("transfer-encoding", "chunked"), ("content-length", "5")],
            (True, None, False),
        ),
        case(
            "the same length twice",
            200,
            [("content-length", "5"), ("content-length", "5")],
            (False, 5, True),
        ),
        case("204 has no body", 204, [], (False, 0, True)),
        case("304 has no body", 304, [("content-length", "5")], (False, 0, True)),
        case(
            "close among other options",
            200,
            [("content-length", "5"), ("connection", "foo, Close")],
            (False, 5, False),
        ),
        case(
            "identity is no encoding",
            200,
            [("content-length", "5"), ("content-encoding", "identity")],
            (False, 5, True),
        ),
    ],
)
def test_response_framing(status: int, headers: Any, expected: Any) -> None:
    assert shim.response_framing(status, headers) == expected


@pytest.mark.parametrize(
    "headers",
    [
        case("a compressed body", [("content-encoding", "gzip"), ("content-length", "5")]),
        case("two lengths", [("content-length", "5"), ("content-length", "6")]),
        case("a list of lengths", [("content-length", "5, 5")]),
        case("a signed length", [("content-length", "+5")]),
        case("a negative length", [("content-length", "-5")]),
        case("a length in hexadecimal", [("content-length", "0x5")]),
        case("a length with an underscore", [("content-length", "1_0")]),
        case("a digit that is not ASCII", [("content-length", "\xb2")]),
        case("an empty length", [("content-length", "")]),
        case("a length of twenty digits", [("content-length", "1" * 20)]),
        case("compressed and chunked", [("transfer-encoding", "gzip, chunked")]),
        case("another coding after chunked", [("transfer-encoding", "chunked, identity")]),
        case("chunked twice", [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
        case("an unknown coding", [("transfer-encoding", "xchunked")]),
    ],
)
def test_response_framing_that_is_ambiguous_is_refused(headers: Any) -> None:
    with pytest.raises(shim.UpstreamCutError):
        shim.response_framing(200, headers)


def test_request_as_upstream_gets_it() -> None:
    with (
        FakeUpstream([FINE_ANSWER]) as fake,
        http_upstream(f"{fake.url}/gate/", extra_headers=[("x-team", "blue")]) as upstream,
    ):
        response = sent(upstream, ("x-api-key", "k"), path="/v1/messages?beta=true")
        assert (response.status, read_whole(response)) == (200, b"fine")
        assert read_whole(sent(upstream, method="GET", path="/v1/models", body=b"")) == b"fine"
    post = (
        f"POST /gate/v1/messages?beta=true HTTP/1.1\r\nHost: {fake.host}\r\nx-team: blue\r\n"
        "Accept-Encoding: identity\r\nx-api-key: k\r\nContent-Length: 2\r\n\r\n{}"
    )
    get = (
        f"GET /gate/v1/models HTTP/1.1\r\nHost: {fake.host}\r\nx-team: blue\r\n"
        "Accept-Encoding: identity\r\n\r\n"
    )
    assert fake.requests == [post.encode(), get.encode()]


@pytest.mark.parametrize(
    ("script", "body", "connections"),
    [
        case("a length", [FINE_ANSWER], b"fine", 1),
        case("an empty body", [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], b"", 1),
        case("no content", [b"HTTP/1.1 204 No Content\r\n\r\n"], b"", 1),
        case("chunks", [CHUNKED_HEAD + in_chunks(b"fi", b"ne") + LAST_CHUNK], b"fine", 1),
        case(
            "chunks and trailers",
            [CHUNKED_HEAD + b"4;a=b\r\nfine\r\n0\r\nX: 1\r\n\r\n"],
            b"fine",
            1,
        ),
        case(
            "one byte at a time",
            [bytes([byte]) for byte in CHUNKED_HEAD + in_chunks(b"fine") + LAST_CHUNK],
            b"fine",
            1,
        ),
        case("100 Continue first", [b"HTTP/1.1 100 Continue\r\n\r\n", FINE_ANSWER], b"fine", 1),
        case(
            "early hints first",
            [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 103 \r\n\r\n" + FINE_ANSWER],
            b"fine",
            1,
        ),
        case("until it closes", [b"HTTP/1.1 200 OK\r\n\r\nfi", b"ne", CLOSE], b"fine", 2),
        case(
            "a connection that is to be closed",
            [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nfine"],
            b"fine",
            2,
        ),
        case("bytes after the answer", [FINE_ANSWER + b"HTTP/1.1 200 OK\r\n\r\n"], b"fine", 2),
    ],
)
def test_connection_is_used_again_after_a_whole_answer(
    script: List[Any], body: bytes, connections: int
) -> None:
    with FakeUpstream(script) as fake, http_upstream(fake.url) as upstream:
        assert [read_whole(sent(upstream)) for _ in range(2)] == [body, body]
        assert (len(fake.requests), fake.connections) == (2, connections)


def test_connection_is_not_used_again_when_half_an_answer_was_read() -> None:
    with (
        FakeUpstream([CHUNKED_HEAD + in_chunks(b"fi"), UNTIL_GONE], [FINE_ANSWER]) as fake,
        http_upstream(fake.url) as upstream,
    ):
        response = sent(upstream)
        assert response.source.read() == b"fi"
        response.source.close()
        assert fake.gone.wait(PATIENCE)
        assert read_whole(sent(upstream)) == b"fine"
        assert fake.connections == 2


def test_connections_at_once_are_apart_and_the_last_one_is_taken_first() -> None:
    with FakeUpstream([FINE_ANSWER]) as fake, http_upstream(fake.url) as upstream:
        begun = [sent(upstream) for _ in range(3)]
        assert fake.connections == 3
        assert [read_whole(response) for response in begun] == [b"fine"] * 3
        assert read_whole(sent(upstream)) == b"fine"
        assert fake.connections == 3


@pytest.mark.parametrize(
    "end", [case("it hangs up", CLOSE), case("it resets the connection", RESET)]
)
def test_stale_connection_is_replaced_and_the_request_sent_once_more(end: str) -> None:
    with (
        FakeUpstream([FINE_ANSWER], [end], [FINE_ANSWER]) as fake,
        http_upstream(fake.url) as upstream,
    ):
        assert read_whole(sent(upstream)) == b"fine"
        assert read_whole(sent(upstream)) == b"fine"
        assert (len(fake.requests), fake.connections) == (3, 2)


def test_request_is_sent_at_most_twice() -> None:
    with (
        FakeUpstream([FINE_ANSWER], [CLOSE], [CLOSE], [FINE_ANSWER]) as fake,
        http_upstream(fake.url) as upstream,
    ):
        assert read_whole(sent(upstream)) == b"fine"
        with pytest.raises(shim.UpstreamCutError):
            sent(upstream)
        assert (len(fake.requests), fake.connections) == (3, 2)


def test_request_is_sent_at_most_twice_though_more_connections_are_stale() -> None:
    with (
        FakeUpstream([FINE_ANSWER], [FINE_ANSWER], [CLOSE], [CLOSE], [FINE_ANSWER]) as fake,
        http_upstream(fake.url) as upstream,
    ):
        begun = [sent(upstream), sent(upstream)]
        assert [read_whole(response) for response in begun] == [b"fine", b"fine"]
        with pytest.raises(shim.UpstreamCutError):
            sent(upstream)
        assert (len(fake.requests), fake.connections) == (4, 3)


@pytest.mark.parametrize(
    "script",
    [
        case("it hangs up", [CLOSE]),
        case("it resets the connection", [RESET]),
        case("it hangs up in the head", [b"HTTP/1.1 200 OK\r\nConte", CLOSE]),
        case("it hangs up before the head's empty line", [b"HTTP/1.1 200 OK\r\nA: 1\r\n", CLOSE]),
        case("it hangs up after 100 Continue", [b"HTTP/1.1 100 Continue\r\n\r\n", CLOSE]),
        case("it compresses", [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", UNTIL_GONE]),
        case("it speaks another protocol", [b"220 mail.example ESMTP\r\n\r\n", UNTIL_GONE]),
        case("its head never ends", [b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000, UNTIL_GONE]),
        case("its length is signed", [b"HTTP/1.1 200 OK\r\nContent-Length: +4\r\n\r\nfine"]),
    ],
)
def test_post_is_not_sent_again_after_a_new_connection_broke(script: List[Any]) -> None:
    with FakeUpstream(script, [FINE_ANSWER]) as fake, http_upstream(fake.url) as upstream:
        with pytest.raises(shim.UpstreamCutError) as caught:
            sent(upstream)
        assert caught.value.status == 502
        assert (len(fake.requests), fake.connections) == (1, 1)


@pytest.mark.parametrize(
    "begun",
    [
        case("half a status line", b"HTTP/1.1 20"),
        case("half a head", b"HTTP/1.1 200 OK\r\nA: 1\r\n"),
        case("100 Continue", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_post_is_not_sent_again_after_a_byte_of_an_answer(begun: bytes) -> None:
    with (
        FakeUpstream([FINE_ANSWER], [begun, CLOSE], [FINE_ANSWER]) as fake,
        http_upstream(fake.url) as upstream,
    ):
        assert read_whole(sent(upstream)) == b"fine"
        with pytest.raises(shim.UpstreamCutError):
            sent(upstream)
        assert len(fake.requests) == 2


@pytest.mark.parametrize(
    ("script", "read"),
    [
        case("in a length", [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfine"], b"fine"),
        case("in a chunk", [CHUNKED_HEAD + in_chunks(b"fi") + b"8\r\nne"], b"fine"),
        case("before the end of a chunk", [CHUNKED_HEAD + b"4\r\nfine"], b"fine"),
        case("in the size of a chunk", [CHUNKED_HEAD + in_chunks(b"fine") + b"1"], b"fine"),
        case("between two chunks", [CHUNKED_HEAD + in_chunks(b"fine")], b"fine"),
        case("before the first chunk", [CHUNKED_HEAD], b""),
        case("in the last chunk", [CHUNKED_HEAD + in_chunks(b"fine") + b"0\r\n"], b"fine"),
        case("in the trailers", [CHUNKED_HEAD + in_chunks(b"fine") + b"0\r\nX: 1\r\n"], b"fine"),
    ],
)
@pytest.mark.parametrize("end", [CLOSE, RESET])
def test_answer_that_is_cut_is_an_error(script: List[Any], read: bytes, end: str) -> None:
    go = threading.Event()
    with FakeUpstream([*script, go, end]) as fake, http_upstream(fake.url) as upstream:
        response = sent(upstream)
        pieces, received = shim.pieces_of(response.source), b""
        while len(received) < len(read):
            received += next(pieces)
        go.set()
        with pytest.raises(shim.UpstreamCutError):
            next(pieces)
        response.source.close()
        assert received == read


@pytest.mark.parametrize(
    "chunks_sent",
    [
        case("no size", b"\r\nfine\r\n"),
        case("a size with a prefix", b"0x4\r\nfine\r\n"),
        case("a signed size", b"+4\r\nfine\r\n"),
        case("a chunk longer than its size", b"2\r\nfine\r\n"),
        case("a bare LF after the size", b"4\nfine\r\n"),
    ],
)
def test_answer_whose_chunks_are_malformed_is_an_error(chunks_sent: bytes) -> None:
    script = [CHUNKED_HEAD + chunks_sent + LAST_CHUNK, UNTIL_GONE]
    with FakeUpstream(script) as fake, http_upstream(fake.url) as upstream:
        response = sent(upstream)
        with pytest.raises(shim.UpstreamCutError):
            read_whole(response)
        response.source.close()
        assert fake.gone.wait(PATIENCE)


def test_redirect_is_not_followed() -> None:
    with (
        FakeUpstream([FINE_ANSWER]) as other,
        FakeUpstream(
            [
                f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {other.url}/\r\n"
                "Content-Length: 0\r\n\r\n".encode()
            ]
        ) as fake,
        http_upstream(fake.url) as upstream,
    ):
        response = sent(upstream, ("x-api-key", "k"))
        assert (response.status, response.header("location")) == (307, f"{other.url}/")
        assert read_whole(response) == b""
        assert other.connections == 0


def test_port_without_server_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
    with (
        http_upstream(f"http://{host}") as upstream,
        pytest.raises(shim.UpstreamUnreachableError) as caught,
    ):
        sent(upstream)
    assert caught.value.status == 502
    assert host in caught.value.message


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        case("nothing comes", [UNTIL_GONE], {}),
        case("half a head comes", [b"HTTP/1.1 200 OK\r\nA:", UNTIL_GONE], {}),
        case("only 100 Continue comes", [b"HTTP/1.1 100 Continue\r\n\r\n", UNTIL_GONE], {}),
    ],
)
def test_head_that_does_not_come_in_time(script: List[Any], parts: JSON) -> None:
    with FakeUpstream(script) as fake, http_upstream(fake.url, first_byte=0.05) as upstream:
        with pytest.raises(shim.UpstreamTimeoutError) as caught:
            sent(upstream, **parts)
        assert caught.value.status == 504
        assert fake.gone.wait(PATIENCE)


def test_head_is_awaited_for_less_time_where_the_request_says_so() -> None:
    with FakeUpstream([UNTIL_GONE]) as fake, http_upstream(fake.url) as upstream:
        with pytest.raises(shim.UpstreamTimeoutError):
            sent(upstream, patience=0.05)
        assert fake.gone.wait(PATIENCE)


def test_connection_of_an_http_1_0_answer_is_not_used_again() -> None:
    old = b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfine"
    with FakeUpstream([old]) as fake, http_upstream(fake.url) as upstream:
        assert [read_whole(sent(upstream)) for _ in range(2)] == [b"fine", b"fine"]
        assert fake.connections == 2


def test_flood_of_interim_answers_does_not_outlast_the_limit() -> None:
    def flood() -> Iterator[bytes]:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            yield b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10

    with (
        FakeUpstream([flood(), FINE_ANSWER, UNTIL_GONE]) as fake,
        http_upstream(fake.url, first_byte=0.05) as upstream,
    ):
        with pytest.raises(shim.ShimError):
            read_whole(sent(upstream))
        assert fake.gone.wait(PATIENCE)


@pytest.mark.parametrize(
    "limit",
    [case("it falls silent", {"silence": 0.05}), case("it takes too long in all", {"total": -1.0})],
)
def test_body_that_does_not_come_in_time_s3_b21(limit: Dict[str, float]) -> None:
    script = [CHUNKED_HEAD + in_chunks(b"fi"), UNTIL_GONE]
    with FakeUpstream(script) as fake, http_upstream(fake.url, **limit) as upstream:
        response = sent(upstream)
        with pytest.raises(shim.UpstreamTimeoutError):
            read_whole(response)
        response.source.drop()
        assert fake.gone.wait(PATIENCE)


@pytest.mark.parametrize(
    "after",
    [case("and closes", CLOSE), case("and reads on", UNTIL_GONE)],
)
def test_refusal_that_comes_while_a_large_body_is_sent_is_heard(after: str) -> None:
    refusal = (
        b"HTTP/1.1 413 Payload Too Large\r\nConnection: close\r\nContent-Length: 5\r\n\r\nlarge"
    )
    with FakeUpstream([EARLY, refusal, after]) as fake, http_upstream(fake.url) as upstream:
        response = sent(upstream, body=bytes(16 << 20))
        assert (response.status, read_whole(response)) == (413, b"large")
        assert len(fake.requests) == 1


@pytest.mark.parametrize("reset", [case("by FIN", False), case("by RST", True)])
def test_client_that_leaves_before_the_head_ends_the_request_s3_b10(reset: bool) -> None:
    ours, clients = socket.socketpair()
    if not reset:
        clients.shutdown(socket.SHUT_WR)
    clients.close()
    with ours, FakeUpstream([UNTIL_GONE]) as fake, http_upstream(fake.url) as upstream:
        with pytest.raises(shim.ClientGone):
            sent(upstream, watch=shim.ClientWatch(ours))
        assert fake.gone.wait(PATIENCE)


def test_client_that_sends_its_next_request_early_is_not_gone() -> None:
    ours, clients = socket.socketpair()
    with ours, clients, FakeUpstream([FINE_ANSWER]) as fake, http_upstream(fake.url) as upstream:
        clients.sendall(b"GET")
        assert read_whole(sent(upstream, watch=shim.ClientWatch(ours))) == b"fine"
        assert ours.recv(9) == b"GET"


@pytest.mark.parametrize(
    "parts",
    [
        case("CRLF in a value", {"headers": [("x-a", "b\r\nEvil: 1")]}),
        case("LF in a value", {"headers": [("x-a", "b\nEvil: 1")]}),
        case("a fold in a value", {"headers": [("x-a", "b\r\n c")]}),
        case("NUL in a value", {"headers": [("x-a", "b\x00")]}),
        case("a character beyond Latin-1", {"headers": [("x-a", "\u4e16")]}),
        case("CRLF in a name", {"headers": [("x-a: 1\r\nEvil", "1")]}),
        case("CRLF in the path", {"path": "/v1/models HTTP/1.1\r\nEvil: 1\r\n"}),
    ],
)
def test_header_that_would_break_out_of_its_line_is_refused(parts: JSON) -> None:
    with FakeUpstream([FINE_ANSWER]) as fake, http_upstream(fake.url) as upstream:
        with pytest.raises(shim.RequestError):
            sent(upstream, **parts)
        assert fake.requests == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil-localhost", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert shim.is_loopback(host) is expected


@pytest.fixture
def proxy_environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set these proxies, and no others."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def set_to(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        case("for https", {"HTTPS_PROXY": PROXY}, "https://a.example", {"https": PROXY}),
        case("in lower case", {"https_proxy": PROXY}, "https://a.example", {"https": PROXY}),
        case("for all", {"ALL_PROXY": PROXY}, "https://a.example", {"https": PROXY}),
        case("for http", {"http_proxy": PROXY}, "http://a.example/v", {"http": PROXY}),
        case("for another scheme", {"http_proxy": PROXY}, "https://a.example", {}),
        case(
            "for a name without scheme",
            {"HTTPS_PROXY": "p:1"},
            "https://a.example",
            {"https": "p:1"},
        ),
        case("never for loopback", {"ALL_PROXY": PROXY}, "http://127.0.0.1:9", {}),
        case("never for localhost", {"HTTP_PROXY": PROXY}, "http://localhost:9", {}),
        case(
            "not for a name of NO_PROXY",
            {"HTTPS_PROXY": PROXY, "NO_PROXY": "b.example,a.example"},
            "https://a.example",
            {},
        ),
        case(
            "not below a domain of NO_PROXY",
            {"HTTPS_PROXY": PROXY, "NO_PROXY": ".example"},
            "https://a.example",
            {},
        ),
        case(
            "beside a name of NO_PROXY",
            {"HTTPS_PROXY": PROXY, "NO_PROXY": "b.example"},
            "https://a.example",
            {"https": PROXY},
        ),
        case("for nothing", {"HTTPS_PROXY": ""}, "https://a.example", {}),
    ],
)
def test_proxies_of_the_environment(
    variables: Dict[str, str], url: str, expected: Dict[str, str], proxy_environment: Any
) -> None:
    proxy_environment(**{"NO_PROXY": "nothing.example", **variables})
    assert shim.proxies_for(url) == expected


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "https://proxy.example"])
def test_proxy_that_is_not_spoken_to_is_a_setting_to_correct(
    proxy: str, proxy_environment: Any
) -> None:
    proxy_environment(HTTPS_PROXY=proxy, NO_PROXY="nothing.example")
    with pytest.raises(shim.ConfigError):
        shim.HTTPUpstream("https://a.example")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        case("it wants another password", [b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"], "407"),
        case("it hangs up", [CLOSE], "proxy"),
        case("it hangs up in its head", [b"HTTP/1.1 200 OK\r\n", CLOSE], "proxy"),
        case("it says nothing", [UNTIL_GONE], "timed out"),
        case(
            "it does not go on in TLS", [b"HTTP/1.1 200 OK\r\n\r\n", b"no\r\n" * 9, CLOSE], "secure"
        ),
    ],
)
def test_proxy_that_does_not_connect(script: List[Any], told: str, proxy_environment: Any) -> None:
    with FakeUpstream(script) as proxy:
        proxy_environment(HTTPS_PROXY=f"http://ann:s%40cret@{proxy.host}", NO_PROXY="b.example")
        with (
            http_upstream("https://a.example", connect=0.5) as upstream,
            pytest.raises(shim.UpstreamUnreachableError) as caught,
        ):
            sent(upstream, ("x-api-key", "k"))
    assert told in caught.value.message
    assert "cret" not in caught.value.message
    asked = (
        b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n"
        b"Proxy-Authorization: Basic YW5uOnNAY3JldA==\r\n\r\n"
    )
    assert proxy.requests == [asked]


# A key for tests, and the certificate that it signed for localhost, 127.0.0.1 and upstream.example.
TEST_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg3OfS435gbSvFISbj
7off/tUxnfswXFcNrCchKX7AHM2hRANCAAR62Y1Dp24Kyyju0UhnP+mU0Xmdn14s
l6BiNkknEUKUv3M6fzhGILvrVoxjugXcai8ZL2edEKMWx8Y720+M433t
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBvjCCAWWgAwIBAgIUKm2vXoVSpSXYV75/Eco99R9uvQEwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTEyMjkxNFoYDzIxMjYxMDI4
MTIyOTE0WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR62Y1Dp24Kyyju0UhnP+mU0Xmdn14sl6BiNkknEUKUv3M6fzhGILvr
VoxjugXcai8ZL2edEKMWx8Y720+M433to4GSMIGPMB0GA1UdDgQWBBTWT2DsWKCI
5G5Z0ZtFqSh+oOKfZDAfBgNVHSMEGDAWgBTWT2DsWKCI5G5Z0ZtFqSh+oOKfZDAs
BgNVHREEJTAjgglsb2NhbGhvc3SCEHVwc3RyZWFtLmV4YW1wbGWHBH8AAAEwDgYD
VR0PAQH/BAQDAgKEMA8GA1UdEwEB/wQFMAMBAf8wCgYIKoZIzj0EAwIDRwAwRAIg
JBbksh+J9P2YJVp4fiz+RLHHPBl8+YXs+VtfiVYVgMkCIBK4KtX7sHRxN8YU9++i
mnaRWgj9i7lLGuIeaJDobCLJ
-----END CERTIFICATE-----
"""
TEST_CERT = TEST_PEM[TEST_PEM.index("-----BEGIN CERT") :]


@pytest.fixture
def tls_server(tmp_path: Path) -> ssl.SSLContext:
    """What an upstream at localhost or upstream.example shows."""
    (tmp_path / "test.pem").write_text(TEST_PEM, encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "test.pem")
    return context


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cadata=TEST_CERT)


def test_tls_upstream_is_read_in_any_pieces_over_one_connection(tls_server: ssl.SSLContext) -> None:
    slowly = [FINE_ANSWER[i : i + 1] for i in range(len(FINE_ANSWER))]
    with FakeUpstream(slowly, [FINE_ANSWER], tls=tls_server) as fake:
        url = f"https://localhost:{fake.host.partition(':')[2]}"
        with contextlib.closing(shim.HTTPUpstream(url, context=trusting())) as upstream:
            for _ in range(2):
                assert read_whole(sent(upstream, ("x-api-key", "k"))) == b"fine"
        assert fake.connections == 1


@pytest.mark.parametrize(
    ("name", "context", "told"),
    [
        case("an unknown authority", "upstream.example", ssl.create_default_context, "--ca-file"),
        case("a certificate for another name", "other.example", trusting, "Hostname mismatch"),
    ],
)
def test_tls_upstream_that_cannot_be_trusted_gets_nothing(
    name: str, context: Any, told: str, tls_server: ssl.SSLContext, proxy_environment: Any
) -> None:
    with FakeUpstream([FINE_ANSWER], tls=tls_server, tunnels=True) as fake:
        proxy_environment(HTTPS_PROXY=f"http://{fake.host}", NO_PROXY="b.example")
        upstream = shim.HTTPUpstream(f"https://{name}", context=context())
        with contextlib.closing(upstream), pytest.raises(shim.UpstreamUnreachableError) as caught:
            sent(upstream, ("x-api-key", "k"))
        assert told in caught.value.message
        assert len(fake.requests) == 1  # the CONNECT


def test_tls_upstream_behind_a_proxy_that_connects(
    tls_server: ssl.SSLContext, proxy_environment: Any
) -> None:
    with FakeUpstream([FINE_ANSWER], tls=tls_server, tunnels=True) as fake:
        proxy_environment(HTTPS_PROXY=f"http://ann:secret@{fake.host}", NO_PROXY="b.example")
        upstream = shim.HTTPUpstream("https://upstream.example", context=trusting())
        with contextlib.closing(upstream):
            assert read_whole(sent(upstream, ("x-api-key", "k"))) == b"fine"
    connect, request = fake.requests
    assert connect == (
        b"CONNECT upstream.example:443 HTTP/1.1\r\nHost: upstream.example:443\r\n"
        b"Proxy-Authorization: Basic YW5uOnNlY3JldA==\r\n\r\n"
    )
    assert b"Host: upstream.example\r\n" in request
    assert b"x-api-key: k\r\n" in request
    assert b"roxy-" not in request


def test_plain_upstream_behind_a_proxy(proxy_environment: Any) -> None:
    with FakeUpstream([FINE_ANSWER]) as proxy:
        proxy_environment(HTTP_PROXY=f"http://ann:secret@{proxy.host}", NO_PROXY="b.example")
        with http_upstream("http://a.example:81/v") as upstream:
            assert read_whole(sent(upstream, path="/models", method="GET", body=b"")) == b"fine"
            assert read_whole(sent(upstream, path="/models", method="GET", body=b"")) == b"fine"
    asked = (
        b"GET http://a.example:81/v/models HTTP/1.1\r\nHost: a.example:81\r\n"
        b"Accept-Encoding: identity\r\nProxy-Authorization: Basic YW5uOnNlY3JldA==\r\n\r\n"
    )
    assert (proxy.connections, proxy.requests) == (1, [asked, asked])


# ----------------------------------------------------------------------
# 9. Upstream over HTTP: retries
# ----------------------------------------------------------------------

DELAYS = [
    case("429 with retry-after", 429, {"retry-after": "7"}, 0, 7.0),
    case("429 with a fraction", 429, {"retry-after": "0.25"}, 0, 0.25),
    case("milliseconds win", 429, {"retry-after": "9", "retry-after-ms": "1500"}, 0, 1.5),
    case("429 without: a spending limit, in vain", 429, {}, 0, None),
    case("429 with a date is no number of seconds", 429, {"retry-after": "Wed, 21 Oct"}, 0, None),
    case("529 at first", 529, {}, 0, 0.5),
    case("529 doubled", 529, {}, 1, 1.0),
    case("529 at most 8 s", 529, {}, 9, 8.0),
    case("529 with retry-after", 529, {"retry-after": "3"}, 0, 3.0),
    case("500", 500, {}, 0, 0.5),
    case("502", 502, {}, 0, 0.5),
    case("503", 503, {}, 0, 0.5),
    case("504", 504, {}, 0, 0.5),
    case("408", 408, {}, 0, 0.5),
    case("409", 409, {}, 0, 0.5),
    case("200", 200, {}, 0, None),
    case("400 is never tried again (S1-R23)", 400, {"retry-after": "1"}, 0, None),
    case("401", 401, {}, 0, None),
    case("413", 413, {}, 0, None),
    case("upstream says no", 529, {"x-should-retry": "false"}, 0, None),
    case(
        "upstream says no to a 429", 429, {"x-should-retry": "false", "retry-after": "1"}, 0, None
    ),
    case("upstream says yes", 400, {"x-should-retry": "true"}, 0, 0.5),
    case("upstream says yes to a 429 without delay", 429, {"x-should-retry": "true"}, 0, 0.5),
    case("a negative delay is none", 529, {"retry-after": "-5"}, 0, 0.5),
    case("an endless delay is none", 529, {"retry-after": "inf"}, 0, 0.5),
    case("not a number", 529, {"retry-after": "nan"}, 0, 0.5),
]


@pytest.mark.parametrize(("status", "headers", "attempt", "expected"), DELAYS)
def test_retry_delay(
    status: int, headers: Dict[str, str], attempt: int, expected: Optional[float]
) -> None:
    assert shim.retry_delay(status, list(headers.items()), attempt) == expected


def rate_limited(**headers: str) -> Answer:
    return refused(429, "rate_limit_error", "slow down", **headers)


def overloaded(**headers: str) -> Answer:
    return refused(529, "overloaded_error", "Overloaded", **headers)


SOON = {"retry_after": "0"}
FINE = streamed(*TEXT_EVENTS)

TRIES = [
    case("an answer is not asked for again", [FINE], 2, [200]),
    case("429 with retry-after: 0, then fine", [rate_limited(**SOON), FINE], 2, [429, 200]),
    case("429 without retry-after is final", [rate_limited(), FINE], 2, [429]),
    case("529, then fine", [overloaded(**SOON), overloaded(**SOON), FINE], 2, [529, 529, 200]),
    case("no more tries than allowed", [overloaded(**SOON)], 2, [529, 529, 529]),
    case("no tries allowed", [overloaded(**SOON), FINE], 0, [529]),
    case("x-should-retry: false", [overloaded(x_should_retry="false", **SOON), FINE], 2, [529]),
    case(
        "x-should-retry: true",
        [refused(400, "invalid_request_error", "odd", x_should_retry="true", **SOON), FINE],
        2,
        [400, 200],
    ),
    case(
        "retry-after beyond our patience is handed down (S1-B6)",
        [rate_limited(retry_after="3600"), FINE],
        2,
        [429],
    ),
    case("400 after a 529 is final", [overloaded(**SOON), refused(400, "x", "y")], 2, [529, 400]),
]

QUESTION_UP = shim.UpstreamRequest("POST", "/v1/messages", [], b"{}")


def retried(upstream: shim.Upstream, policy: shim.RetryPolicy) -> shim.UpstreamResponse:
    return shim.driven(shim.send_with_retries(QUESTION_UP, policy), upstream)


@pytest.mark.parametrize(("answers", "retries", "statuses"), TRIES)
def test_retries(answers: List[Answer], retries: int, statuses: List[int]) -> None:
    upstream = ScriptedUpstream(*answers)
    response = retried(upstream, shim.RetryPolicy(retries))
    assert [request._replace(delay=0.0) for request in upstream.requests] == [QUESTION_UP] * len(
        statuses
    )
    assert response.status == statuses[-1]
    let_go = [source.fate for source in upstream.sources]
    assert let_go == ["closed"] * (len(statuses) - 1) + ["open"]


LAST_WORDS = [
    case("after tries of ours", [overloaded(**SOON)], 2, ["false"]),
    case(
        "after tries of ours, although upstream would like more",
        [overloaded(x_should_retry="true", **SOON)],
        1,
        ["false"],
    ),
    case("after none of ours the client may try", [overloaded(**SOON)], 0, []),
    case("patience that never began", [rate_limited(retry_after="3600")], 2, []),
    case("upstream's own word stays", [overloaded(x_should_retry="false")], 2, ["false"]),
    case("after success", [overloaded(**SOON), FINE], 2, []),
]


@pytest.mark.parametrize(("answers", "retries", "expected"), LAST_WORDS)
def test_retries_are_not_multiplied_by_clients(
    answers: List[Answer], retries: int, expected: List[str]
) -> None:
    upstream = ScriptedUpstream(*answers)
    response = retried(upstream, shim.RetryPolicy(retries))
    assert [v for k, v in response.headers if k == "x-should-retry"] == expected


def test_retry_after_that_is_handed_down_stays_in_the_answer() -> None:
    upstream = ScriptedUpstream(rate_limited(retry_after="3600"))
    response = retried(upstream, shim.RetryPolicy(2))
    assert response.header("retry-after") == "3600"


def test_retries_end_when_patience_is_used_up() -> None:
    upstream = ScriptedUpstream(overloaded(retry_after_ms="10"))
    policy = shim.RetryPolicy(100, patience=0.025)
    assert retried(upstream, policy).status == 529
    assert len(upstream.requests) == 3  # 10 ms twice; the third 10 ms would be beyond 25


def test_unreachable_upstream_is_tried_again() -> None:
    gone = shim.UpstreamUnreachableError("no route", headers=[("retry-after", "0")])
    upstream = ScriptedUpstream(gone, FINE)
    assert retried(upstream, shim.RetryPolicy(2)).status == 200
    assert len(upstream.requests) == 2


def test_unreachable_upstream_is_an_error_in_the_end() -> None:
    upstream = ScriptedUpstream(
        shim.UpstreamUnreachableError("no route", headers=[("retry-after", "0")])
    )
    with pytest.raises(shim.UpstreamUnreachableError) as caught:
        retried(upstream, shim.RetryPolicy(1))
    assert len(upstream.requests) == 2
    assert ("x-should-retry", "false") in caught.value.headers


def test_cut_before_the_head_is_not_sent_twice() -> None:
    """The request may have been taken, and paid for."""
    upstream = ScriptedUpstream(shim.UpstreamCutError("cut"), FINE)
    with pytest.raises(shim.UpstreamCutError):
        retried(upstream, shim.RetryPolicy(2))
    assert len(upstream.requests) == 1


# ----------------------------------------------------------------------
# 10. Upstream echo
# ----------------------------------------------------------------------

ECHO_HEAD = {
    "id": "msg_echo",
    "type": "message",
    "role": "assistant",
    "model": "claude-opus-5-5",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
}
CITY_TOOL = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
}


def to_echo(content: Any, **fields: Any) -> JSON:
    """A Messages request of one user turn."""
    turn = {"role": "user", "content": content}
    return {"model": "claude-opus-5-5", "messages": [turn], **fields}


def from_echo(body: JSON, path: str = "/v1/messages") -> Tuple[int, JSON]:
    request = shim.UpstreamRequest("POST", path, [], json.dumps(body).encode())
    response = shim.EchoUpstream().send(request)
    return response.status, json.loads(response.source.read())


def test_echo_streams_the_events_of_the_real_one() -> None:
    assert shim.echo_events(to_echo("Say  hi")) == [
        {
            "type": "message_start",
            "message": {**ECHO_HEAD, "usage": {"input_tokens": 10, "output_tokens": 1}},
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        text_delta(0, "Say  "),
        text_delta(0, "hi"),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 9},
        },
        {"type": "message_stop"},
    ]


def test_echo_thinks_and_calls_a_tool() -> None:
    body = to_echo("Rain?", thinking={"type": "adaptive"}, tools=[CITY_TOOL])
    assert shim.echo_events(body)[1:-1] == [
        block_start(0, type="thinking", thinking="", signature=""),
        block_delta(0, type="thinking_delta", thinking="What "),
        block_delta(0, type="thinking_delta", thinking="was "),
        block_delta(0, type="thinking_delta", thinking="I "),
        block_delta(0, type="thinking_delta", thinking="asked?"),
        block_delta(0, type="signature_delta", signature="ZWNobw=="),
        block_stop(0),
        block_start(1, type="tool_use", id="toolu_echo", name="weather", input={}),
        json_delta(1, '{"city": "echo", "days": 1}'),
        block_stop(1),
        message_delta("tool_use", {"output_tokens": 44}),
    ]


def test_echo_answers_whole_without_stream() -> None:
    usage = {"input_tokens": 10, "output_tokens": 9}
    said = [{"type": "text", "text": "Say  hi"}]
    expected = {**ECHO_HEAD, "content": said, "stop_reason": "end_turn", "usage": usage}
    assert from_echo(to_echo("Say  hi")) == (200, expected)


def test_echo_says_the_same_bytes_to_the_same_question() -> None:
    raw = json.dumps(to_echo("again", stream=True, thinking={"type": "enabled"})).encode()
    request = shim.UpstreamRequest("POST", "/v1/messages?beta=true", [], raw)
    first, second = (shim.EchoUpstream().send(request) for _ in range(2))
    assert first.is_event_stream()
    assert first.source.read() == second.source.read()
    assert first.header("request-id") == "req_echo"


ECHO_TEXTS = [
    case("a string", to_echo("hi"), "hi"),
    case("the texts of blocks", to_echo([{"type": "text", "text": t} for t in "ab"]), "a\nb"),
    case("nothing", {"messages": []}, "(nothing was said)"),
    case("an image alone", to_echo([{"type": "image", "source": {}}]), "(nothing was said)"),
    case(
        "a result of a tool",
        to_echo([{"type": "tool_result", "tool_use_id": "t", "content": "18C"}]),
        "I got the result of the tool.",
    ),
]


@pytest.mark.parametrize(("body", "expected"), ECHO_TEXTS)
def test_echo_text(body: JSON, expected: str) -> None:
    assert shim.echo_text(body) == expected


def test_echo_calls_a_tool_once() -> None:
    body = to_echo([{"type": "tool_result", "tool_use_id": "t", "content": "18C"}])
    assert shim.echo_content({**body, "tools": [CITY_TOOL]}) == [
        {"type": "text", "text": "I got the result of the tool."}
    ]


def test_echo_calls_no_tool_where_none_is_chosen() -> None:
    body = to_echo("hi", tools=[CITY_TOOL], tool_choice={"type": "none"})
    assert shim.echo_content(body) == [{"type": "text", "text": "hi"}]


def test_echo_fills_a_schema() -> None:
    format = {"type": "json_schema", "schema": CITY_TOOL["input_schema"]}
    body = to_echo("hi", output_config={"format": format})
    assert shim.echo_content(body) == [{"type": "text", "text": '{"city": "echo", "days": 1}'}]


ECHO_SAMPLES = [
    case("a string", {"type": "string"}, "echo"),
    case("an integer", {"type": "integer"}, 1),
    case("a number", {"type": "number"}, 1.5),
    case("a boolean", {"type": "boolean"}, True),
    case("null", {"type": "null"}, None),
    case("a list", {"type": "array", "items": {"type": "string"}}, []),
    case("the first of an enumeration", {"enum": ["red", "blue"]}, "red"),
    case("a constant", {"const": 7}, 7),
    case("the first of a union", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 1),
    case("properties without a type", {"properties": {"a": {"type": "null"}}}, {"a": None}),
    case("objects inside objects", {"properties": {"a": {"properties": {}}}}, {"a": {}}),
    case("several types", {"type": ["string", "null"]}, "echo"),
    case("anything", True, "echo"),
]


@pytest.mark.parametrize(("schema", "expected"), ECHO_SAMPLES)
def test_echo_sample(schema: Any, expected: Any) -> None:
    assert shim.echo_sample(schema) == expected


ECHO_ERRORS = [
    case("400", 400, "invalid_request_error"),
    case("401", 401, "authentication_error"),
    case("429", 429, "rate_limit_error"),
    case("500", 500, "api_error"),
    case("529", 529, "overloaded_error"),
    case("one without a type of its own", 503, "api_error"),
]


@pytest.mark.parametrize(("status", "type_"), ECHO_ERRORS)
def test_echo_fails_on_request(status: int, type_: str) -> None:
    error = {"type": type_, "message": "you asked for this error"}
    body = to_echo(f"please [echo error {status}] now", stream=True)
    assert from_echo(body) == (status, {"type": "error", "error": error})


@pytest.mark.parametrize("status", ["000", "099", "200", "304", "999"])
def test_echo_takes_only_statuses_of_errors_for_an_error(status: str) -> None:
    assert from_echo(to_echo(f"[echo error {status}]"))[0] == 200


def test_echo_counts_tokens() -> None:
    path = "/v1/messages/count_tokens?beta=true"
    assert from_echo(to_echo("Say  hi"), path) == (200, {"input_tokens": 10})


def test_echo_has_nothing_else() -> None:
    status, body = from_echo({}, "/v1/files")
    assert (status, body["error"]["type"]) == (404, "not_found_error")


ODD_BODIES = [
    case("thinking is a number", {"thinking": 5}),
    case("tools is a number", {"tools": 5}),
    case("a tool is a number", {"tools": [5]}),
    case("a tool has no name", {"tools": [{"input_schema": {}}]}),
    case("tool_choice is text", {"tools": [CITY_TOOL], "tool_choice": "auto"}),
    case("output_config is text", {"output_config": "x"}),
    case("messages is a number", {"messages": 5}),
]


@pytest.mark.parametrize("fields", ODD_BODIES)
def test_echo_refuses_an_odd_body_instead_of_failing(fields: JSON) -> None:
    app = shim.App(shim.EchoUpstream(), policy=shim.Policy(live_models=False))
    response = ask(app, "/v1/messages", {**to_echo("hi"), **fields})
    assert response.status == 400
    assert answered(response)["error"]["type"] == "invalid_request_error"


def test_echo_of_a_long_text_makes_no_event_of_each_word() -> None:
    text = "word " * 100_000
    events = shim.echo_events({"messages": [{"role": "user", "content": text}]})
    deltas = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert len(deltas) == 1000
    assert "".join(deltas) == text


# ----------------------------------------------------------------------
# 11. Log
# ----------------------------------------------------------------------

PLAIN_TEXTS = [
    case("as it is", "/v1/messages", "/v1/messages"),
    case("empty", "", "-"),
    case("a line of one's own", "a\nb\r\nc", "a_b__c"),
    case("a terminal's escape", "\x1b[2Jx", "_[2Jx"),
    case("a field of one's own", "x key=admin", "x_key=admin"),
    case("beyond ASCII", "\u4e16\u2028\x85", "___"),
    case("half a surrogate pair", "\ud83d", "_"),
    case("too long", "x" * 500, "x" * 120),
]


@pytest.mark.parametrize(("text", "expected"), PLAIN_TEXTS)
def test_plain(text: str, expected: str) -> None:
    assert shim.plain(text) == expected


def test_log_line() -> None:
    record = shim.Record("POST", "/v1/messages", 200, 1.23456, "req_1", "claude-opus-5-5", "ann")
    assert shim.log_line(record) == (
        "POST /v1/messages 200 1234.6ms req_1 model=claude-opus-5-5 key=ann ok"
    )


def test_log_line_cannot_be_forged() -> None:
    evil = "x\n1.2.3.4 GET / 200"
    line = shim.log_line(shim.Record(evil, evil, 404, 0.0, evil, evil, evil, evil))
    assert line == (
        "x_1.2.3.4_ x_1.2.3.4_GET_/_200 404 0.0ms x_1.2.3.4_GET_/_200 "
        "model=x_1.2.3.4_GET_/_200 key=x_1.2.3.4_GET_/_200 x_1.2.3.4_GET_/_200"
    )


def test_log_masks_every_secret() -> None:
    stream = io.StringIO()
    log = shim.Log(stream, ["sk-ant-1", "", "key-of-ann"])
    log.write("upstream said: invalid key sk-ant-1 (sk-ant-1), not key-of-ann")
    assert stream.getvalue() == "upstream said: invalid key [secret] ([secret]), not [secret]\n"


def test_log_masks_a_secret_that_begins_with_another() -> None:
    log = shim.Log(None, ["sk-1", "sk-1-and-more"])
    assert log.masked("sk-1-and-more") == "[secret]"


def test_log_writes_a_note_once() -> None:
    stream = io.StringIO()
    log = shim.Log(stream)
    for line in ("note: a", "note: b", "note: a"):
        log.once(line)
    assert stream.getvalue() == "note: a\nnote: b\n"


def test_log_of_notes_is_bounded() -> None:
    stream = io.StringIO()
    log = shim.Log(stream)
    for number in range(1100):
        log.once(f"note: {number}")
    assert stream.getvalue().count("\n") == 1000


def test_log_that_cannot_be_written_stops_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    shim.Log(stream).write("lost")
    shim.Log(None).write("nowhere")


def test_log_never_breaks_on_what_its_stream_cannot_encode() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    shim.Log(stream).write("note: \u4e16")
    shim.Log(stream).write("note: next")
    assert raw.getvalue().endswith(b"note: next\n")


SLASHED = "sk-ant-oat01-s3cret/+?"
MASKED = [
    case("as it is", f"a {SLASHED} b", "a [secret] b"),
    case("percent-encoded", "k=sk-ant-oat01-s3cret%2F%2B%3F&b", "k=[secret]&b"),
    case("in base64", base64.b64encode(SLASHED.encode()).decode(), "[secret]w=="),
    case(
        "in base64 behind one byte",
        base64.b64encode(b":" + SLASHED.encode()).decode(),
        "On[secret]8=",
    ),
    case(
        "in base64 between others, for URLs",
        base64.urlsafe_b64encode(b"Basic user:" + SLASHED.encode() + b"xyz").decode(),
        "QmFzaWMgdXNlcjp[secret]eHl6",
    ),
]


@pytest.mark.parametrize(("line", "expected"), MASKED)
def test_secret_is_masked_in_every_spelling(line: str, expected: str) -> None:
    assert shim.Log(None, [SLASHED]).masked(line) == expected
    later = shim.Log(None)
    later.hide(SLASHED)
    assert later.masked(line) == expected


def test_masks_of_renewed_secrets_do_not_push_out_the_others() -> None:
    log = shim.Log(None, ["of-a-client"])
    for number in range(100):
        log.hide(f"token-{number}")
    assert log.masked("of-a-client token-99 token-98") == "[secret] [secret] [secret]"


# ----------------------------------------------------------------------
# 12. Endpoints
# ----------------------------------------------------------------------

QUESTION: JSON = {"model": "claude-opus-5-5", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


def settled(response: shim.Response) -> shim.Response:
    """The answer with its body read to the end."""
    if isinstance(response.body, shim.Gathered):
        for stream in response.body.streams:
            list(pumped(stream))
        return response.body.response()
    return response._replace(body=played(response))


def field(response: shim.Response, name: str) -> List[str]:
    """All values of a header field of an answer."""
    return [value for key, value in response.headers if key == name]


def fetch(app: shim.App, path: str, **headers: str) -> shim.Response:
    """Get a path of an App."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return app.respond(shim.Request("GET", path, named, b"", "shim_1"))


def in_json(status: int, body: Any, **headers: str) -> Answer:
    """An answer of upstream: a whole JSON body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    all_headers = {"content-type": "application/json", "request-id": "req_1", **named}
    return status, all_headers, [json.dumps(body).encode()]


# --- paths

PATHS = [
    case("as it should be", "/v1/chat/completions", "/v1/chat/completions"),
    case("without /v1 (S4-R9)", "/chat/completions", "/v1/chat/completions"),
    case("/v1 twice", "/v1/v1/chat/completions", "/v1/chat/completions"),
    case("/v1 three times", "/v1/v1/v1/messages", "/v1/messages"),
    case("a slash at the end", "/v1/chat/completions/", "/v1/chat/completions"),
    case("double slashes", "//v1//chat/completions", "/v1/chat/completions"),
    case("/openai", "/openai/chat/completions", "/v1/chat/completions"),
    case("/openai/v1", "/openai/v1/chat/completions", "/v1/chat/completions"),
    case("/api/v1", "/api/v1/chat/completions", "/v1/chat/completions"),
    case(
        "Azure's deployments",
        "/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21",
        "/v1/chat/completions",
    ),
    case("engines", "/v1/engines/davinci/completions", "/v1/completions"),
    case("engines without /v1", "/engines/davinci/completions", "/v1/completions"),
    case("a query", "/v1/messages?beta=true", "/v1/messages"),
    case("messages without /v1", "/messages", "/v1/messages"),
    case("tokens without /v1", "/messages/count_tokens", "/v1/messages/count_tokens"),
    case("a base URL that holds /v1/messages", "/v1/messages/v1/messages", "/v1/messages"),
    case(
        "a base URL that holds the endpoint",
        "/v1/chat/completions/chat/completions",
        "/v1/chat/completions",
    ),
    case(
        "the base URL of chat with the path of another endpoint",
        "/v1/chat/completions/responses",
        "/v1/responses",
    ),
    case("models behind it", "/v1/chat/completions/models", "/v1/models"),
    case("models", "/models", "/v1/models"),
    case("a model with a slash", "/v1/models/anthropic%2Fclaude", "/v1/models/anthropic%2Fclaude"),
    case("a model without /v1", "/models/opus", "/v1/models/opus"),
    case("the root", "/", "/"),
    case("nothing but a query", "/?deep=1", "/"),
    case("/v1 alone", "/v1/", "/v1"),
    case("health", "/health/", "/health"),
    case("a word that begins like a prefix", "/openaix/v1/messages", "/openaix/v1/messages"),
    case("a version that is none", "/v1beta/models", "/v1beta/models"),
    case("Ollama's tags stay what they are", "/api/tags", "/api/tags"),
    case("LM Studio's models stay what they are", "/api/v0/models", "/api/v0/models"),
    case(
        "batches of messages",
        "/v1/messages/batches/b_1/results",
        "/v1/messages/batches/b_1/results",
    ),
]


@pytest.mark.parametrize(("target", "expected"), PATHS)
def test_normalised_path(target: str, expected: str) -> None:
    assert shim.normalised_path(target) == expected


NOT_SERVED = [
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/audio/speech",
    "/v1/assistants",
    "/v1/realtime",
    "/v1/fim/completions",
    "/v1/rerank",
    "/api/tags",
    "/api/version",
    "/api/v0/models",
    "/v1/model/info",
    "/props",
    "/v1/messagesx",
    "/v1/messages/../organizations",
    "/v1/messages/batches/../../organizations/me",
    "/v1/messages/batches/%2e%2e/%2e%2e/organizations/me",
    "/v1/skills/../api_keys",
]


@pytest.mark.parametrize("path", NOT_SERVED)
def test_unknown_path_is_404_and_never_relayed(path: str) -> None:
    app, upstream = app_on(FINE)
    with pytest.raises(shim.NotFoundError) as caught:
        app.admit("POST", path, {})
    assert caught.value.status == 404
    assert ask(app, path, QUESTION).status == 404
    assert upstream.requests == []


def test_unknown_path_is_told_in_openais_dialect_s4_b31() -> None:
    app, _ = app_on(FINE)
    response = ask(app, "/v1/embeddings", {})
    assert response.status == 404  # 501 would be tried three times
    assert field(response, "content-type") == ["application/json"]
    error = answered(response)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert error["code"] == "unsupported_endpoint"


@pytest.mark.parametrize("path", ["/v1/messages/x", "/v1/skillsx", "/v1/embeddings"])
def test_unknown_path_is_told_in_anthropics_dialect(path: str) -> None:
    app, _ = app_on(FINE)
    response = ask(app, path, {}, anthropic_version="2023-06-01")
    assert response.status == 404
    assert answered(response)["type"] == "error"
    assert answered(response)["error"]["type"] == "not_found_error"


# --- before the body

ADMITTED = [
    case("a right key", "POST", CHAT, {"authorization": "Bearer key-of-ann"}, "ann"),
    case("health is open", "GET", "/health", {}, ""),
    case("the root is open", "HEAD", "/", {}, ""),
    case("OPTIONS are open", "OPTIONS", CHAT, {}, ""),
    case("a deep look with a key", "GET", "/health?deep=1", {"x-api-key": "key-of-bob"}, "bob"),
]


@pytest.mark.parametrize(("method", "target", "headers", "name"), ADMITTED)
def test_admitted(method: str, target: str, headers: Dict[str, str], name: str) -> None:
    app, _ = app_on(FINE, client_keys=CLIENT_KEYS)
    assert app.admit(method, target, headers) == name


KEPT_OUT = [
    case("no key", "POST", CHAT, {}, 401),
    case("a wrong key", "POST", MESSAGES, {"x-api-key": "key-of-eve"}, 401),
    case("models need a key too (S3-B24)", "GET", "/v1/models", {}, 401),
    case("a deep look costs a call", "GET", "/health?deep=1", {}, 401),
    case("an unknown path tells nothing without a key", "POST", "/v1/embeddings", {}, 401),
    case("an unknown path", "POST", "/v1/embeddings", {"x-api-key": "key-of-ann"}, 404),
    case("a wrong method", "DELETE", CHAT, {"x-api-key": "key-of-ann"}, 405),
]


@pytest.mark.parametrize(("method", "target", "headers", "status"), KEPT_OUT)
def test_kept_out_before_the_body(
    method: str, target: str, headers: Dict[str, str], status: int
) -> None:
    app, _ = app_on(FINE, client_keys=CLIENT_KEYS)
    with pytest.raises(shim.ShimError) as caught:
        app.admit(method, target, headers)
    assert caught.value.status == status


METHODS = [
    case("chat", "DELETE", CHAT, "POST"),
    case("messages", "GET", MESSAGES, "POST"),
    case("models", "POST", "/v1/models", "GET, HEAD"),
    case("health", "POST", "/health", "GET, HEAD"),
    case("batches", "PUT", "/v1/messages/batches", "GET, POST, DELETE"),
]


@pytest.mark.parametrize(("method", "path", "allow"), METHODS)
def test_wrong_method_is_405_with_allow(method: str, path: str, allow: str) -> None:
    """S3-B30: 405 without Allow."""
    app, _ = app_on(FINE)
    with pytest.raises(shim.MethodNotAllowedError) as caught:
        app.admit(method, path, {})
    response = app.failure(caught.value, shim.Request(method, path, {}))
    assert response.status == 405
    assert field(response, "allow") == [allow]
    assert caught.value.message == f"{path} takes {allow}, not {method}"


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        case("a known path", CHAT, "POST, OPTIONS"),
        case("an unknown path", "/nowhere", "OPTIONS"),
    ],
)
def test_options_tell_methods_and_share_nothing(path: str, allow: str) -> None:
    """S4-B3: CORS for everybody. A page of another site learns nothing here."""
    app, _ = app_on(FINE)
    response = app.respond(shim.Request("OPTIONS", path, {"origin": "https://evil.example"}))
    assert response == shim.Response(204, [("allow", allow)])


def test_failures_in_openais_dialect() -> None:
    app, _ = app_on(FINE)
    error = shim.RequestError("wrong", param="messages.0")
    response = app.failure(error, shim.Request("POST", CHAT, {}, b"", "shim_9"))
    assert response.status == 400
    assert answered(response) == {
        "error": {
            "message": "wrong",
            "type": "invalid_request_error",
            "param": "messages.0",
            "code": None,
        }
    }


def test_failures_in_anthropics_dialect() -> None:
    app, _ = app_on(FINE)
    error = shim.RequestError("wrong", param="messages.0")
    response = app.failure(error, shim.Request("POST", MESSAGES, {}, b"", "shim_9"))
    assert response.status == 400
    assert answered(response) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "messages.0: wrong"},
        "request_id": "shim_9",
    }


def test_failures_never_show_a_secret() -> None:
    upstream = ScriptedUpstream(refused(401, "authentication_error", "invalid key sk-ant-ours"))
    key = shim.APIKey("sk-ant-ours", "the test")
    policy = shim.Policy(live_models=False, retries=shim.RetryPolicy(0))
    app = shim.App(upstream, key, policy, shim.Log(None, key.secrets()))
    assert (
        answered(ask(app, CHAT, QUESTION))["error"]["message"]
        == "Incorrect API key provided: invalid key [secret]"
    )


# --- chat completions

SAID = "Hell\u00f6 \u4e16\U0001f600"
FINE_USAGE = {
    "prompt_tokens": 25,
    "completion_tokens": 15,
    "total_tokens": 40,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0, "cache_write_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
}


def test_chat_as_upstream_gets_it() -> None:
    """S3-B27: another client's identity; S4-B27: a version that does not exist."""
    app, upstream = app_on(FINE)
    ask(app, CHAT, {**QUESTION, "max_tokens": 5000}, authorization="Bearer x", cookie="c=1")
    request = upstream.requests[0]
    assert (request.method, request.path) == ("POST", "/v1/messages")
    assert request.headers == [
        ("anthropic-version", "2023-06-01"),
        ("content-type", "application/json"),
        ("accept", "text/event-stream"),
        ("user-agent", f"claude-shim/{shim.__version__}"),
        ("x-api-key", "sk-ant-api03-upstream"),
    ]
    assert json.loads(request.body) == {
        "model": "claude-opus-5-5",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 5000,
        "stream": True,
    }


def test_chat_betas_of_the_body_go_up_as_a_header() -> None:
    app, upstream = app_on(FINE)
    ask(app, CHAT, {**QUESTION, "betas": ["a-2026-01-01", "b-2026-01-01", "a-2026-01-01"]})
    assert ("anthropic-beta", "a-2026-01-01,b-2026-01-01") in upstream.requests[0].headers


def test_chat_whole_answer_is_read_after_the_head_s3_b9() -> None:
    app, upstream = app_on(FINE)
    response = settled(ask(app, CHAT, QUESTION))
    assert (response.status, response.model) == (200, "claude-opus-5-5")
    assert field(response, "content-type") == ["application/json"]
    assert field(response, "x-request-id") == ["req_1"]
    assert field(response, "x-claude-shim-ignored") == []
    body = answered(response)
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "id": "chatcmpl-msg_01",
        "object": "chat.completion",
        "model": "claude-opus-5-5",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": SAID,
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": FINE_USAGE,
        "service_tier": "default",
        "system_fingerprint": "claude_shim",
    }
    assert len(upstream.requests) == 1


def test_chat_stream() -> None:
    """S2-F5: a stream that was buffered. S3-B12: [DONE] twice."""
    app, _ = app_on(FINE)
    body = {**QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    response = ask(app, CHAT, body)
    assert isinstance(response.body, shim.Stream)
    assert field(response, "x-request-id") == ["req_1"]
    *parsed, usage, done = chunks(played(response))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in parsed) == SAID
    assert [c["choices"][0]["finish_reason"] for c in parsed] == [None, None, None, "stop"]
    assert parsed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {c["id"] for c in parsed} == {"chatcmpl-msg_01"}
    assert (usage["choices"], usage["usage"], done) == ([], FINE_USAGE, "[DONE]")


def test_chat_answer_names_the_resolved_model() -> None:
    """S2-F10, S3-B25, S4-B18: the answer echoed what was asked for."""
    app, upstream = app_on(FINE, aliases={"gpt-4o*": "opus"})
    response = settled(ask(app, CHAT, {**QUESTION, "model": "gpt-4o-mini"}))
    assert upstream.bodies()[0]["model"] == "claude-opus-5-5"
    assert (response.model, answered(response)["model"]) == ("claude-opus-5-5", "claude-opus-5-5")


MODEL_NAMES = [
    case("an id", "claude-opus-4-6", {}, "claude-opus-4-6"),
    case("a line", "sonnet", {}, "claude-sonnet-5-5"),
    case("behind a provider (S2-R4)", "openai/haiku", {}, "claude-haiku-5-5"),
    case("an unknown Claude passes through", "claude-opus-9", {}, "claude-opus-9"),
    case("a pinned line", "opus", {"opus": "claude-opus-4-5"}, "claude-opus-4-5"),
    case("a glob", "gpt-4o-mini", {"gpt-4o*": "sonnet"}, "claude-sonnet-5-5"),
    case("Azure's deployment", None, {}, "claude-haiku-5-5"),
]


def test_model_aliases_follow_new_settings() -> None:
    app, upstream = app_on(FINE, FINE, aliases={"mine": "claude-haiku-4-5"})
    ask(app, CHAT, {**QUESTION, "model": "mine"})
    app.policy = app.policy._replace(aliases={"mine": "claude-opus-4-8"})  # as SIGHUP does it
    ask(app, CHAT, {**QUESTION, "model": "mine"})
    models = [body["model"] for body in upstream.bodies()]
    assert models == ["claude-haiku-4-5", "claude-opus-4-8"]


@pytest.mark.parametrize(("name", "aliases", "expected"), MODEL_NAMES)
def test_chat_model_names(name: Optional[str], aliases: Dict[str, str], expected: str) -> None:
    app, upstream = app_on(FINE, aliases=aliases)
    path = CHAT if name else "/openai/deployments/haiku/chat/completions?api-version=1"
    played(ask(app, path, {**QUESTION, "model": name}))
    assert [body["model"] for body in upstream.bodies()] == [expected]


@pytest.mark.parametrize("name", ["gpt-4o", "", "opus-9000", "llama3", "\ud83d"])
def test_chat_unknown_model_is_a_404_that_names_what_exists(name: str) -> None:
    """S2-F9, S4-B18: silently Sonnet."""
    app, upstream = app_on(FINE)
    response = ask(app, CHAT, {**QUESTION, "model": name})
    error = answered(response)["error"]
    assert (response.status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert (
        "does not exist here. Use one of opus, sonnet, haiku, claude-opus-5-5" in error["message"]
    )
    assert upstream.requests == []


def test_messages_unknown_model_is_told_in_anthropics_dialect() -> None:
    app, upstream = app_on(FINE)
    response = ask(app, MESSAGES, {**QUESTION, "model": "gpt-4o"})
    error = answered(response)["error"]
    assert (response.status, error["type"]) == (404, "not_found_error")
    assert error["message"].startswith("model: The model 'gpt-4o' does not exist here.")
    assert upstream.requests == []


def test_chat_several_choices_are_several_questions() -> None:
    """S3-B31, S4-B7: n was never read."""
    other = streamed(
        message_start(id="msg_02"),
        block_start(0, type="text", text=""),
        text_delta(0, "Other"),
        block_stop(0),
        message_delta("max_tokens", {"output_tokens": 5}),
        MESSAGE_STOP,
    )
    app, upstream = app_on(FINE, other)
    body = answered(ask(app, CHAT, {**QUESTION, "n": 2}))
    assert upstream.bodies()[0] == upstream.bodies()[1]
    shown = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]]
    assert shown == [(0, SAID, "stop"), (1, "Other", "length")]
    assert body["usage"] == {
        **FINE_USAGE,
        "prompt_tokens": 50,
        "completion_tokens": 20,
        "total_tokens": 70,
    }


def test_chat_several_choices_fail_as_one() -> None:
    app, upstream = app_on(FINE, overloaded())
    response = settled(ask(app, CHAT, {**QUESTION, "n": 2}))
    assert response.status == 503
    assert upstream.sources[0].fate == "dropped"  # nobody pays for the rest of it


MANY = [
    case("several with stream", {"n": 2, "stream": True}, "n"),
    case("more than 16", {"n": 17}, "n"),
    case("a whole lot", {"n": 10**9}, "n"),
]


@pytest.mark.parametrize(("fields", "param"), MANY)
def test_chat_too_many_choices(fields: JSON, param: str) -> None:
    app, upstream = app_on(FINE)
    response = ask(app, CHAT, {**QUESTION, **fields})
    assert (response.status, answered(response)["error"]["param"]) == (400, param)
    assert upstream.requests == []


def test_chat_ignored_fields_are_named_and_logged_once() -> None:
    """S4-B7: fields dropped in silence."""
    log = io.StringIO()
    app, _ = app_on(FINE)
    app.log = shim.Log(log)
    body = {**QUESTION, "seed": 7, "logit_bias": {"50256": -100}, "new\r\nfield": 1}
    for _ in range(2):
        response = settled(ask(app, CHAT, body))
        assert field(response, "x-claude-shim-ignored") == ["seed,logit_bias,new__field"]
    assert log.getvalue() == (
        "note: seed has no effect on Claude and is ignored\n"
        "note: logit_bias has no effect on Claude and is ignored\n"
        "note: new__field has no effect on Claude and is ignored\n"
    )


def test_chat_strict_refuses_what_would_have_no_effect() -> None:
    app, upstream = app_on(FINE, strict=True)
    response = ask(app, CHAT, {**QUESTION, "seed": 7})
    assert (response.status, answered(response)["error"]["param"]) == (400, "seed")
    assert upstream.requests == []
    assert settled(ask(app, CHAT, QUESTION)).status == 200


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        case("an id gets OpenAI's name", [("request-id", "r1")], [("x-request-id", "r1")]),
        case(
            "who pays",
            [("x-claude-shim-billing", "api-key")],
            [("x-claude-shim-billing", "api-key")],
        ),
        case(
            "a limit has both names, an instant becomes a time to wait",
            [
                ("anthropic-ratelimit-tokens-limit", "5"),
                ("anthropic-ratelimit-requests-reset", "1970-01-01T00:01:05Z"),
            ],
            [
                ("x-ratelimit-limit-tokens", "5"),
                ("anthropic-ratelimit-tokens-limit", "5"),
                ("x-ratelimit-reset-requests", "1m5s"),
                ("anthropic-ratelimit-requests-reset", "1970-01-01T00:01:05Z"),
            ],
        ),
        case(
            "a field that comes twice",
            [("retry-after", "1"), ("retry-after", "2")],
            [("retry-after", "1"), ("retry-after", "2")],
        ),
        case(
            "what is upstream's alone", [("via", "x"), ("set-cookie", "a=b"), ("cf-ray", "1")], []
        ),
    ],
)
def test_header_fields_for_an_openai_client(
    given: List[Tuple[str, str]], expected: List[Tuple[str, str]]
) -> None:
    assert shim.openai_headers(given, 0.0) == expected


def test_chat_limits_of_upstream_are_told_in_both_forms() -> None:
    told = {
        "anthropic_ratelimit_requests_limit": "1000",
        "anthropic_ratelimit_requests_remaining": "999",
        "anthropic_ratelimit_requests_reset": "2020-01-01T00:00:00Z",
        "anthropic_ratelimit_tokens_limit": "80000",
        "anthropic_ratelimit_unified_status": "allowed",
        "set_cookie": "c=1",
    }
    app, _ = app_on(streamed(*TEXT_EVENTS, **told))
    response = settled(ask(app, CHAT, QUESTION))
    assert field(response, "x-ratelimit-limit-requests") == ["1000"]
    assert field(response, "x-ratelimit-remaining-requests") == ["999"]
    assert field(response, "x-ratelimit-reset-requests") == ["0s"]
    assert field(response, "x-ratelimit-limit-tokens") == ["80000"]
    assert field(response, "anthropic-ratelimit-unified-status") == ["allowed"]
    assert field(response, "set-cookie") == []


DURATIONS = [
    case("six minutes", "2026-11-01T00:06:00Z", "6m0s"),
    case("seconds", "2026-11-01T00:00:59Z", "59s"),
    case("a part of a second is one", "2026-11-01T00:00:00.200000+00:00", "1s"),
    case("hours stay minutes", "2026-11-01T02:00:05Z", "120m5s"),
    case("the past", "2026-10-01T00:00:00Z", "0s"),
    case("another zone", "2026-11-01T01:00:30+01:00", "30s"),
    case("not a time", "soon", "soon"),
]


@pytest.mark.parametrize(("until", "expected"), DURATIONS)
def test_duration(until: str, expected: str) -> None:
    assert shim.duration(until, 1_793_491_200.0) == expected  # 2026-11-01T00:00:00Z


def test_legacy_completion() -> None:
    app, upstream = app_on(FINE)
    body = answered(ask(app, "/v1/completions", {"model": "opus", "prompt": "hi"}))
    assert upstream.bodies()[0]["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    ]
    assert (body["id"], body["object"]) == ("cmpl-msg_01", "text_completion")
    choice_ = {"index": 0, "text": SAID, "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [choice_]


def test_legacy_completion_of_several_prompts() -> None:
    app, upstream = app_on(FINE)
    body = {"model": "opus", "prompt": ["a", "b"], "n": 2}
    choices = answered(ask(app, "/v1/completions", body))["choices"]
    assert [c["index"] for c in choices] == [0, 1, 2, 3]
    asked = [b["messages"][0]["content"][0]["text"] for b in upstream.bodies()]
    assert asked == ["a", "a", "b", "b"]


def test_legacy_completion_stream() -> None:
    app, _ = app_on(FINE)
    body = {"model": "opus", "prompt": "hi", "stream": True}
    *parsed, done = chunks(played(ask(app, "/v1/completions", body)))
    assert {chunk["object"] for chunk in parsed} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in parsed) == SAID
    assert (parsed[-1]["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")


def test_legacy_completion_through_an_engine_of_the_path() -> None:
    app, upstream = app_on(FINE)
    played(ask(app, "/engines/haiku/completions", {"prompt": "hi"}))
    assert upstream.bodies()[0]["model"] == "claude-haiku-5-5"


LEGACY_REFUSED = [
    case("tokens", {"prompt": [1, 2]}, "prompt"),
    case("no prompt", {}, "prompt"),
    case("no prompts", {"prompt": []}, "prompt"),
    case("a suffix", {"prompt": "a", "suffix": "b"}, "suffix"),
    case("echo", {"prompt": "a", "echo": True}, "echo"),
    case("best_of", {"prompt": "a", "best_of": 3}, "best_of"),
    case("too many", {"prompt": ["a"] * 17}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), LEGACY_REFUSED)
def test_legacy_completion_refused(fields: JSON, param: str) -> None:
    app, upstream = app_on(FINE)
    response = ask(app, "/v1/completions", {"model": "opus", **fields})
    assert (response.status, answered(response)["error"]["param"]) == (400, param)
    assert upstream.requests == []


# --- refusals that are cured


def bad_request(message: str) -> Answer:
    return refused(400, "invalid_request_error", message)


ASSISTANT_LAST = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
SYSTEM_LATE = [
    {"role": "user", "content": "a"},
    {"role": "system", "content": "Be short."},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
ONE_TOOL = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

CURES = [
    case(
        "sampling fields",
        {"model": "claude-opus-4-6", "temperature": 0.5},
        "`temperature` is deprecated for this model.",
        lambda body: body.get("temperature"),
        [0.5, None, None],
        "temperature",
    ),
    case(
        "forced tools",
        {"model": "claude-opus-5", "tools": ONE_TOOL, "tool_choice": "required"},
        "tool_choice forces tool use, which this model does not take",
        lambda body: body["tool_choice"]["type"],
        ["any", "auto", "auto"],
        "tool_choice",
    ),
    case(
        "a trailing assistant message",
        {"model": "claude-opus-4-5", "messages": ASSISTANT_LAST},
        "This model does not support assistant message prefill.",
        lambda body: body["messages"][-1]["role"],
        ["assistant", "user", "user"],
        "",
    ),
    case(
        "a system message in the middle",
        {"model": "claude-opus-4-8", "messages": SYSTEM_LATE},
        "messages.1: role 'system' is not supported on this model",
        lambda body: [m["role"] for m in body["messages"]],
        [["user", "system", "assistant", "user"], *[["user", "assistant", "user"]] * 2],
        "",
    ),
    case(
        "the effort",
        {"model": "claude-opus-5-5", "reasoning_effort": "low"},
        "output_config.effort: not supported by this model",
        lambda body: body.get("output_config", {}).get("effort"),
        ["low", None, None],
        None,
    ),
]


@pytest.mark.parametrize(("fields", "message", "look", "expected", "told"), CURES)
def test_refusal_that_names_a_field_is_cured_once_and_remembered(
    fields: JSON, message: str, look: Any, expected: List[Any], told: Optional[str]
) -> None:
    app, upstream = app_on(bad_request(message), FINE)
    responses = [settled(ask(app, CHAT, {**QUESTION, **fields})) for _ in range(2)]
    assert [response.status for response in responses] == [200, 200]
    assert [look(body) for body in upstream.bodies()] == expected
    if told is not None:
        named = [",".join(field(r, "x-claude-shim-ignored")) for r in responses]
        assert named == [told, told]


def test_cure_is_remembered_for_its_model_only() -> None:
    app, upstream = app_on(bad_request("`temperature` is deprecated for this model."), FINE)
    for model in ("claude-opus-4-6", "claude-sonnet-4-6"):
        settled(ask(app, CHAT, {**QUESTION, "model": model, "temperature": 0.5}))
    assert [body.get("temperature") for body in upstream.bodies()] == [0.5, None, 0.5]


def test_two_refusals_are_cured_one_after_the_other() -> None:
    app, upstream = app_on(
        bad_request("`temperature` is deprecated for this model."),
        bad_request("This model does not support assistant message prefill."),
        FINE,
    )
    body = {"model": "claude-opus-4-5", "messages": ASSISTANT_LAST, "temperature": 0.5}
    assert settled(ask(app, CHAT, body)).status == 200
    assert len(upstream.requests) == 3


INCURABLE = [
    case("a refusal that names nothing", "messages.0.content: too odd", {}, 1),
    case("a refusal of what was not sent", "`temperature` is deprecated", {}, 1),
    case("the same refusal again", "`temperature` is deprecated", {"temperature": 0.5}, 2),
]


@pytest.mark.parametrize(("message", "fields", "requests"), INCURABLE)
def test_refusal_that_is_not_cured(message: str, fields: JSON, requests: int) -> None:
    app, upstream = app_on(bad_request(message))
    response = ask(app, CHAT, {**QUESTION, "model": "claude-opus-4-6", **fields})
    assert (response.status, answered(response)["error"]["message"]) == (400, message)
    assert len(upstream.requests) == requests


def test_refusal_of_another_status_is_not_cured() -> None:
    app, upstream = app_on(refused(403, "permission_error", "`temperature` is not for you"))
    body = {**QUESTION, "model": "claude-opus-4-6", "temperature": 0.5}
    assert ask(app, CHAT, body).status == 403
    assert len(upstream.requests) == 1


def test_refusal_that_no_cure_helped_teaches_nothing() -> None:
    message = "`temperature` is deprecated"
    app, upstream = app_on(bad_request(message), bad_request("something else"), FINE)
    body = {**QUESTION, "model": "claude-opus-4-6", "temperature": 0.5}
    assert [ask(app, CHAT, body).status for _ in range(2)] == [400, 200]
    assert [b.get("temperature") for b in upstream.bodies()] == [0.5, None, 0.5]


# --- thinking

THINKING_BLOCK = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
CALLED = streamed(
    message_start(),
    block_start(0, type="thinking", thinking="", signature=""),
    block_delta(0, type="thinking_delta", thinking="Hm."),
    block_delta(0, type="signature_delta", signature="c2ln"),
    block_stop(0),
    block_start(1, type="tool_use", id="toolu_1", name="f", input={}),
    json_delta(1, "{}"),
    block_stop(1),
    message_delta("tool_use"),
    MESSAGE_STOP,
)
TOOL_LOOP: JSON = {
    "model": "claude-opus-5-5",
    "tools": ONE_TOOL,
    "messages": [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "f", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "18C"},
    ],
}
CALL_BLOCK = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}


@pytest.mark.parametrize("stream", [case("streamed", True), case("whole", False)])
def test_thinking_is_restored_on_the_next_turn(stream: bool) -> None:
    """S4-B14: thinking was never replayed."""
    app, upstream = app_on(CALLED, FINE)
    first = {**TOOL_LOOP, "messages": TOOL_LOOP["messages"][:1], "stream": stream}
    played(ask(app, CHAT, first))
    played(ask(app, CHAT, TOOL_LOOP))
    assert upstream.bodies()[1]["messages"][1] == {
        "role": "assistant",
        "content": [THINKING_BLOCK, CALL_BLOCK],
    }


def test_thinking_of_a_cut_answer_is_not_remembered() -> None:
    cut = CALLED[2][0][:-20]
    app, upstream = app_on((200, CALLED[1], [cut]), FINE)
    response = settled(ask(app, CHAT, {**TOOL_LOOP, "messages": TOOL_LOOP["messages"][:1]}))
    assert response.status == 502
    played(ask(app, CHAT, TOOL_LOOP))
    assert upstream.bodies()[1]["messages"][1]["content"] == [CALL_BLOCK]


REFUSED_SIGNATURES = [
    "messages.1.content.0: Invalid `signature` in `thinking` block",
    "messages.1.content.0: `thinking` or `redacted_thinking` blocks in the latest turn changed",
    "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found `text`.",
]


@pytest.mark.parametrize("message", REFUSED_SIGNATURES)
def test_thinking_is_stripped_once_when_its_signature_is_refused(message: str) -> None:
    app, upstream = app_on(bad_request(message), FINE)
    carried = {**TOOL_LOOP["messages"][1], "thinking_blocks": [THINKING_BLOCK]}
    turns = [TOOL_LOOP["messages"][0], carried, TOOL_LOOP["messages"][2]]
    assert settled(ask(app, CHAT, {**TOOL_LOOP, "messages": turns})).status == 200
    first, second = (body["messages"][1]["content"] for body in upstream.bodies())
    assert first == [THINKING_BLOCK, CALL_BLOCK]
    assert second == [CALL_BLOCK]


def test_thinking_is_not_stripped_twice() -> None:
    app, upstream = app_on(bad_request(REFUSED_SIGNATURES[0]))
    response = ask(app, CHAT, TOOL_LOOP)
    assert (response.status, len(upstream.requests)) == (400, 2)


def test_thinking_memory_is_bounded() -> None:
    block = {"type": "thinking", "thinking": "x" * 100, "signature": "s"}
    memory = shim.ThinkingMemory(max_bytes=500)
    for number in range(4):
        memory.remember([f"toolu_{number}"], [block])
    assert [bool(memory.recall(f"toolu_{n}")) for n in range(4)] == [False, True, True, True]


def test_thinking_memory_counts_a_block_again_remembered_once() -> None:
    block = {"type": "thinking", "thinking": "x" * 100, "signature": "s"}
    memory = shim.ThinkingMemory(max_bytes=350)
    for _ in range(10):
        memory.remember(["toolu_1", "toolu_2"], [block])
    assert memory.recall("toolu_1") == memory.recall("toolu_2") == [block]
    assert memory.recall("toolu_3") == []


# --- prompt caching

TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
EPHEMERAL = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}

CACHED = [
    case("several turns", "5m", {"messages": TURNS}, EPHEMERAL, EPHEMERAL),
    case("for an hour", "1h", {"messages": TURNS}, HOUR, HOUR),
    case(
        "a question with tools",
        "5m",
        {"messages": TURNS[:2], "tools": ONE_TOOL},
        EPHEMERAL,
        EPHEMERAL,
    ),
    case("a single question is not worth it", "5m", {"messages": TURNS[:2]}, None, None),
    case("switched off", "off", {"messages": TURNS}, None, None),
    case(
        "explicit marks only",
        "5m",
        {"messages": TURNS, "prompt_cache_options": {"mode": "explicit"}},
        None,
        None,
    ),
]


@pytest.mark.parametrize(("ttl", "fields", "outer", "system"), CACHED)
def test_prompt_cache_marks(ttl: str, fields: JSON, outer: Any, system: Any) -> None:
    app, upstream = app_on(FINE, prompt_cache=ttl)
    settled(ask(app, CHAT, {**QUESTION, **fields}))
    body = upstream.bodies()[0]
    assert (body.get("cache_control"), body["system"][-1].get("cache_control")) == (outer, system)


def test_prompt_cache_leaves_the_marks_of_the_client() -> None:
    part = {"type": "text", "text": "a", "cache_control": HOUR}
    app, upstream = app_on(FINE, prompt_cache="5m")
    turns = [TURNS[0], {"role": "user", "content": [part]}, *TURNS[2:]]
    settled(ask(app, CHAT, {**QUESTION, "messages": turns}))
    body = upstream.bodies()[0]
    assert "cache_control" not in body
    assert body["system"] == [{"type": "text", "text": "S"}]
    assert body["messages"][0]["content"] == [part]


# --- a paused turn

SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}
PAUSED_ANSWER = streamed(
    message_start(),
    block_start(0, **SEARCH),
    json_delta(0, '{"query": "x"}'),
    block_stop(0),
    block_start(1, type="text", text=""),
    text_delta(1, "One "),
    block_stop(1),
    message_delta("pause_turn"),
    MESSAGE_STOP,
)
RESUMED = streamed(
    message_start(id="msg_02"),
    block_start(0, type="text", text=""),
    text_delta(0, "two."),
    block_stop(0),
    message_delta("end_turn", {"output_tokens": 7}),
    MESSAGE_STOP,
)
SEARCHING = {**QUESTION, "web_search_options": {}}


def test_paused_turn_goes_on_as_one_message() -> None:
    app, upstream = app_on(PAUSED_ANSWER, RESUMED)
    body = answered(ask(app, CHAT, SEARCHING))
    first, second = upstream.bodies()
    assert second["messages"] == [
        *first["messages"],
        {
            "role": "assistant",
            "content": [{**SEARCH, "input": {"query": "x"}}, {"type": "text", "text": "One "}],
        },
    ]
    assert {**second, "messages": []} == {**first, "messages": []}
    assert upstream.requests[1].headers == upstream.requests[0].headers
    assert body["id"] == "chatcmpl-msg_01"
    [choice_] = body["choices"]
    assert (choice_["message"]["content"], choice_["finish_reason"]) == ("One two.", "stop")
    usage_ = body["usage"]
    assert (usage_["prompt_tokens"], usage_["completion_tokens"]) == (50, 22)
    assert [source.fate for source in upstream.sources] == ["closed", "open"]


def test_paused_turn_is_one_stream() -> None:
    app, _ = app_on(PAUSED_ANSWER, PAUSED_ANSWER, RESUMED)
    body = {**SEARCHING, "stream": True, "stream_options": {"include_usage": True}}
    *parsed, last, done = chunks(played(ask(app, CHAT, body)))
    deltas = [c["choices"][0]["delta"] for c in parsed]
    assert [d["role"] for d in deltas if "role" in d] == ["assistant"]
    assert "".join(d.get("content", "") for d in deltas) == "One One two."
    reasons = [c["choices"][0]["finish_reason"] for c in parsed]
    assert reasons == [None] * (len(parsed) - 1) + ["stop"]
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (75, 37)
    assert done == "[DONE]"


def resuming(*answers: Answer) -> Tuple[shim.ResumingSource, List[JSON]]:
    """A paused turn, and the requests that it makes."""
    upstream = ScriptedUpstream(*answers)
    requests: List[JSON] = []

    def again(request: JSON) -> shim.Conversation[shim.Source]:
        requests.append(request)
        response = yield QUESTION_UP
        return response.source

    first = upstream.send(QUESTION_UP).source
    return shim.ResumingSource(first, {"messages": QUESTION["messages"]}, again), requests


def drained(source: shim.Source) -> List[JSON]:
    """The events of a source."""
    raw = b"".join(pieces_and_resumptions(source))
    return [json.loads(block.partition(b"data: ")[2]) for block in raw.split(b"\n\n") if block]


def test_paused_turn_numbers_its_blocks_on() -> None:
    source, requests = resuming(PAUSED_ANSWER, RESUMED)
    shown = [(event["type"], event.get("index")) for event in drained(source)]
    assert shown == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert len(requests) == 1


def test_paused_turn_in_bursts_of_one_byte() -> None:
    pieces = [
        (status, headers, [bytes([byte]) for byte in b"".join(bursts)])
        for status, headers, bursts in (PAUSED_ANSWER, RESUMED)
    ]
    whole, _ = resuming(PAUSED_ANSWER, RESUMED)
    cut, _ = resuming(*pieces)
    assert drained(cut) == drained(whole)


def test_paused_turn_is_not_resumed_for_ever() -> None:
    source, requests = resuming(PAUSED_ANSWER)
    drained(source)
    assert len(requests) == 20


def test_paused_turn_without_blocks_is_still_one_message() -> None:
    empty = streamed(message_start(), message_delta("pause_turn"), MESSAGE_STOP)
    source, _ = resuming(empty, RESUMED)
    kinds = [event["type"] for event in drained(source)]
    assert kinds.count("message_start") == 1


def test_paused_turn_whose_continuation_fails_is_an_error() -> None:
    app, _ = app_on(PAUSED_ANSWER, overloaded())
    assert settled(ask(app, CHAT, SEARCHING)).status == 503
    app, _ = app_on(PAUSED_ANSWER, overloaded())
    stream = chunks(played(ask(app, CHAT, {**SEARCHING, "stream": True})))
    assert stream[-1]["error"]["code"] == "server_is_overloaded"
    assert "[DONE]" not in stream


# --- failures of upstream, as both dialects see them

HTML = b"<html><h1>413 Request Entity Too Large</h1><center>cloudflare</center></html>"


def web_page(status: int) -> Answer:
    return status, {"content-type": "text/html", "request-id": "req_1"}, [HTML]


LONG = "prompt is too long: 1000001 tokens > 1000000 maximum"
POOR = "Your credit balance is too low to access the Anthropic API."
BAD, BUSY = "invalid_request_error", "server_is_overloaded"

# upstream's answer -> status, type, code and param in OpenAI's dialect
FAILURES = [
    case("400", bad_request("odd"), (400, BAD, None, None)),
    case("400, too long", bad_request(LONG), (400, BAD, "context_length_exceeded", "messages")),
    case("400, no credit", bad_request(POOR), (429, *["insufficient_quota"] * 2, None)),
    case("401", refused(401, "authentication_error", "x"), (401, BAD, "invalid_api_key", None)),
    case("402", refused(402, "billing_error", "x"), (429, *["insufficient_quota"] * 2, None)),
    case("403", refused(403, "permission_error", "x"), (403, BAD, "permission_denied", None)),
    case(
        "404, a model",
        refused(404, "not_found_error", "model: claude-x"),
        (404, BAD, "model_not_found", "model"),
    ),
    case("413", refused(413, "request_too_large", "x"), (413, BAD, "request_too_large", None)),
    case("429", rate_limited(), (429, "rate_limit_error", "rate_limit_exceeded", None)),
    case("500", refused(500, "api_error", "x"), (500, "server_error", None, None)),
    case("504", refused(504, "timeout_error", "x"), (504, "server_error", "timeout", None)),
    case("529", overloaded(), (503, "server_error", BUSY, None)),
    case("a page of Cloudflare", web_page(413), (413, BAD, "request_too_large", None)),
    case("a page of a gateway", web_page(502), (502, "server_error", None, None)),
    case("an odd body", in_json(500, ["?"]), (500, "server_error", None, None)),
    case("an odd error", in_json(400, {"error": "?"}), (400, BAD, None, None)),
    case("no event stream", in_json(200, {}), (502, "server_error", None, None)),
    case("no connection", shim.UpstreamUnreachableError("x"), (502, "server_error", None, None)),
    case("silence", shim.UpstreamTimeoutError("x"), (504, "server_error", "timeout", None)),
]


@pytest.mark.parametrize("stream", [case("streamed", True), case("whole", False)])
@pytest.mark.parametrize(("scripted", "expected"), FAILURES)
def test_failure_of_upstream_in_openais_dialect(
    scripted: Union[Answer, Exception], expected: Any, stream: bool
) -> None:
    """S2-B5, S3-B14: 500 or 502 for everything; S4-B23: an empty stream with status 200."""
    app, _ = app_on(scripted)
    response = ask(app, CHAT, {**QUESTION, "stream": stream})
    error = answered(response)["error"]
    assert (response.status, error["type"], error["code"], error["param"]) == expected
    assert field(response, "content-type") == ["application/json"]
    assert isinstance(error["message"], str)
    assert "<" not in error["message"]


def test_failure_of_upstream_keeps_its_sentence_and_its_headers() -> None:
    told = {"retry_after": "17", "anthropic_ratelimit_requests_remaining": "0"}
    app, _ = app_on(rate_limited(**told))
    response = ask(app, CHAT, QUESTION)
    assert answered(response)["error"]["message"] == "slow down"
    assert field(response, "retry-after") == ["17"]
    assert field(response, "x-ratelimit-remaining-requests") == ["0"]
    assert field(response, "x-request-id") == ["req_1"]


def test_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for() -> None:
    app, _ = app_on(bad_request("input length and `max_tokens` exceed context limit: 5 + 6 > 7"))
    message = answered(ask(app, CHAT, QUESTION))["error"]["message"]
    assert message.startswith("input length and `max_tokens` exceed context limit: 5 + 6 > 7")
    assert "prompt is too long" in message
    assert "maximum context length" in message


@pytest.mark.parametrize("scripted", [bad_request(POOR), refused(402, "billing_error", "x")])
def test_empty_account_is_not_tried_again_by_clients(scripted: Answer) -> None:
    """OpenAI's SDKs try a 429 three times unless x-should-retry says no (wire/openai.md 3)."""
    app, _ = app_on(scripted)
    response = ask(app, CHAT, QUESTION)
    assert response.status == 429
    assert field(response, "x-should-retry") == ["false"]


def test_failure_after_tries_says_that_trying_is_done() -> None:
    app, upstream = app_on(overloaded(**SOON), retries=shim.RetryPolicy(2))
    response = ask(app, CHAT, QUESTION)
    assert (response.status, len(upstream.requests)) == (503, 3)
    assert field(response, "x-should-retry") == ["false"]


LATE_ERRORS = [
    case("overloaded", "overloaded_error", 503),
    case("rate limit", "rate_limit_error", 429),
    case("a wrong request", "invalid_request_error", 400),
    case("upstream's fault", "api_error", 500),
    case("an unknown type", "new_error", 500),
]


@pytest.mark.parametrize(("type_", "status"), LATE_ERRORS)
def test_error_event_gives_a_whole_answer_the_real_status(type_: str, status: int) -> None:
    """S3-B13, S4-B9: an error event that looked like success."""
    event = {"type": "error", "error": {"type": type_, "message": "late"}}
    app, _ = app_on(streamed(*TEXT_EVENTS[:4], event))
    response = settled(ask(app, CHAT, QUESTION))
    assert (response.status, answered(response)["error"]["message"]) == (status, "late")


def test_answer_cut_anywhere_is_502() -> None:
    """S3-B11: truncated, then as if complete."""
    raw = sse(*TEXT_EVENTS)
    for length in range(0, len(raw), 5):
        app, _ = app_on((200, FINE[1], [raw[:length]]))
        response = settled(ask(app, CHAT, QUESTION))
        assert (length, response.status) == (length, 502)
        assert answered(response)["error"]["type"] == "server_error"


def test_connection_lost_in_the_middle_is_told_in_the_stream() -> None:
    lost = shim.UpstreamCutError("upstream closed the connection")
    app, upstream = app_on((200, FINE[1], [sse(*TEXT_EVENTS[:4]), lost]))
    stream = chunks(played(ask(app, CHAT, {**QUESTION, "stream": True})))
    assert stream[-1]["error"]["message"] == "upstream closed the connection"
    assert "[DONE]" not in stream
    assert len(upstream.requests) == 1  # bytes were shown: no second try


RELAYED_FAILURES = [
    case("400", bad_request("odd"), 400),
    case("401", refused(401, "authentication_error", "x", x_should_retry="false"), 401),
    case("402", refused(402, "billing_error", "x"), 402),
    case("404", refused(404, "not_found_error", "model: claude-x"), 404),
    case("429", rate_limited(retry_after="17"), 429),
    case("529 stays 529", overloaded(), 529),
]


@pytest.mark.parametrize("path", [MESSAGES, CHAT, "/v1/responses", "/v1/messages/count_tokens"])
def test_redirect_is_told_in_every_dialect_and_not_handed_on(path: str) -> None:
    moved = (307, {"location": "https://login.example/?token=hunter2"}, [b"<html>"])
    app, upstream = app_on(moved, retries=shim.RetryPolicy(2))
    question = {**QUESTION, "input": "hi"} if path == "/v1/responses" else QUESTION
    response = ask(app, path, question)
    assert (response.status, field(response, "location")) == (502, [])
    assert answered(response)["error"]["message"] == (
        "upstream answers with status 307, a redirect to https://login.example, which is not "
        "followed: --base-url is probably wrong"
    )
    assert field(response, "x-should-retry") == ["false"]
    assert len(upstream.requests) == 1
    assert upstream.sources[0].fate == "dropped"


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 308, 399])
def test_no_status_between_success_and_refusal_answers_a_question(status: int) -> None:
    app, _ = app_on((status, {"location": "/elsewhere"}, [b""]))
    response = ask(app, CHAT, QUESTION)
    assert response.status == 502
    assert answered(response)["error"]["message"] == (
        f"upstream answers with status {status}, a redirect to another page, which is not "
        "followed: --base-url is probably wrong"
    )


def test_relayed_resource_may_be_unchanged() -> None:
    app, _ = app_on((304, {"request-id": "req_1"}, [b""]))
    headers = {"anthropic-version": "2023-06-01"}
    response = app.respond(shim.Request("GET", "/v1/files/file_1", headers))
    assert (response.status, response.body) == (304, b"")


def test_page_of_a_middle_box_is_told_as_an_error_not_shown_as_a_page() -> None:
    app, _ = app_on(web_page(413))
    response = ask(app, MESSAGES, QUESTION)
    assert (response.status, field(response, "content-type")) == (413, ["application/json"])
    assert answered(response)["error"] == {
        "type": "request_too_large",
        "message": "upstream answered with status 413",
    }


@pytest.mark.parametrize(("scripted", "status"), RELAYED_FAILURES)
def test_failure_of_upstream_is_relayed_unmodified(scripted: Answer, status: int) -> None:
    """Claude Code reads the wording of errors (wire/anthropic.md 11)."""
    app, upstream = app_on(scripted, retries=shim.RetryPolicy(2))
    response = ask(app, MESSAGES, QUESTION)
    assert (response.status, response.body) == (status, scripted[2][0])
    for name in ("content-type", "request-id", "retry-after", "x-should-retry"):
        assert field(response, name) == [v for k, v in scripted[1].items() if k == name]
    assert field(response, "x-request-id") == ["req_1"]
    assert len(upstream.requests) == 1  # these clients try again themselves


@pytest.mark.parametrize(
    ("error", "status", "type_"),
    [
        case("no connection", shim.UpstreamUnreachableError("no route"), 502, "api_error"),
        case("silence", shim.UpstreamTimeoutError("too slow"), 504, "timeout_error"),
    ],
)
def test_failure_of_ours_in_a_relayed_request(error: Exception, status: int, type_: str) -> None:
    app, _ = app_on(error)
    response = ask(app, MESSAGES, QUESTION)
    assert response.status == status
    assert answered(response) == {
        "type": "error",
        "error": {"type": type_, "message": str(error)},
        "request_id": "shim_1",
    }


# --- bad input


def with_messages(*messages: Any) -> JSON:
    return {"model": "opus", "messages": list(messages)}


def with_part(part: Any) -> JSON:
    return with_messages({"role": "user", "content": [part]})


def with_call(call: Any) -> JSON:
    return with_messages({"role": "assistant", "tool_calls": [call]})


BAD_BODIES = [
    case("nothing", b"", None),
    case("not JSON", b"hello", None),
    case("half of it", b'{"model": "opus", "messages": [', None),
    case("more after it", b'{"model": "opus", "messages": []} x', None),
    case("not UTF-8", b'{"model": "opus", "messages": "\xff"}', None),
    case("a surrogate in UTF-8", b'{"model": "opus", "messages": "\xed\xa0\xbd"}', None),
    case("a list", b"[]", "the request body"),
    case("null", b"null", "the request body"),
    case("text", b'"x"', "the request body"),
    case("NaN", b'{"model": "opus", "messages": [], "temperature": NaN}', None),
    case("Infinity", b'{"model": "opus", "messages": [], "temperature": -Infinity}', None),
    case("a number beyond floats", b'{"model": "opus", "temperature": 1e999}', None),
    case("5,000 lists", b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", None),
    case("5,000 objects", b'{"a":' * 5000 + b"1" + b"}" * 5000, None),
    case("100,000 open lists", b"[" * 100_000, None),
    case("a number of 100,000 digits", b'{"model": ' + b"9" * 100_000 + b"}", None),
]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", MESSAGES, "/v1/messages/count_tokens"])
@pytest.mark.parametrize(("raw", "param"), BAD_BODIES)
def test_body_that_is_no_request_is_400(raw: bytes, param: Optional[str], path: str) -> None:
    app, upstream = app_on(FINE)
    response = ask(app, path, raw)
    assert response.status == 400
    error = answered(response)["error"]
    assert error["type"] == "invalid_request_error"
    assert error.get("param") == (None if "messages" in path else param)
    assert upstream.requests == []


BAD_CHATS = [
    case("no messages (S2-F6)", {"model": "opus"}, "messages"),
    case("null messages", {"model": "opus", "messages": None}, "messages"),
    case("empty messages (S2-F6)", with_messages(), "messages"),
    case("messages is text", {"model": "opus", "messages": "hi"}, "messages"),
    case("no model", {"messages": QUESTION["messages"]}, "model"),
    case("model is a number", {**QUESTION, "model": 5}, "model"),
    case("a message is a number", with_messages(5), "messages.0"),
    case("a message is null", with_messages(None), "messages.0"),
    case("no role", with_messages({"content": "x"}), "messages.0.role"),
    case("an unknown role", with_messages({"role": "bot", "content": "x"}), "messages.0.role"),
    case("role is a list", with_messages({"role": ["user"]}), "messages.0.role"),
    case(
        "content is a number", with_messages({"role": "user", "content": 5}), "messages.0.content"
    ),
    case(
        "content is an object", with_messages({"role": "user", "content": {}}), "messages.0.content"
    ),
    case("a part is a number", with_part(5), "messages.0.content.0"),
    case("a part of an unknown type", with_part({"type": "smell"}), "messages.0.content.0.type"),
    case("a type that is a list", with_part({"type": []}), "messages.0.content.0.type"),
    case("a text is a number", with_part({"type": "text", "text": 5}), "messages.0.content.0.text"),
    case(
        "an image without URL",
        with_part({"type": "image_url", "image_url": {}}),
        "messages.0.content.0.image_url.url",
    ),
    case(
        "an image of this host",
        with_part({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        "messages.0.content.0.image_url.url",
    ),
    case(
        "tool_calls is text",
        with_messages({"role": "assistant", "tool_calls": "x"}),
        "messages.0.tool_calls",
    ),
    case("a call is null", with_call(None), "messages.0.tool_calls.0"),
    case(
        "a call of nothing",
        with_call({"id": "a", "function": {}}),
        "messages.0.tool_calls.0.function.name",
    ),
    case(
        "a result of nothing",
        with_messages({"role": "tool", "content": "x"}),
        "messages.0.tool_call_id",
    ),
    case("tools is an object", {**QUESTION, "tools": {}}, "tools"),
    case("a tool is text", {**QUESTION, "tools": ["f"]}, "tools.0"),
    case(
        "a tool without a name",
        {**QUESTION, "tools": [{"type": "function", "function": {}}]},
        "tools.0.function.name",
    ),
    case(
        "tool_choice is a number", {**QUESTION, "tools": ONE_TOOL, "tool_choice": 5}, "tool_choice"
    ),
    case(
        "an unknown choice", {**QUESTION, "tools": ONE_TOOL, "tool_choice": "must"}, "tool_choice"
    ),
    case("n is 0", {**QUESTION, "n": 0}, "n"),
    case("n is negative", {**QUESTION, "n": -1}, "n"),
    case("n is text", {**QUESTION, "n": "2"}, "n"),
    case("n is true", {**QUESTION, "n": True}, "n"),
    case("stream is text", {**QUESTION, "stream": "yes"}, "stream"),
    case("temperature is text", {**QUESTION, "temperature": "hot"}, "temperature"),
    case("max_tokens is 0", {**QUESTION, "max_tokens": 0}, "max_tokens"),
    case("max_tokens is a fraction", {**QUESTION, "max_tokens": 1.5}, "max_tokens"),
    case("stop is a number", {**QUESTION, "stop": 5}, "stop"),
    case("stop holds a number", {**QUESTION, "stop": [5]}, "stop.0"),
    case("response_format is text", {**QUESTION, "response_format": "json"}, "response_format"),
    case("stream_options is text", {**QUESTION, "stream_options": "x"}, "stream_options"),
    case("answers in sound", {**QUESTION, "modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHATS)
def test_bad_chat_request_is_400_that_names_the_field(body: JSON, param: str) -> None:
    """S4-B1: such requests blocked the server for ever; S4-B22: 500."""
    app, upstream = app_on(FINE)
    response = ask(app, CHAT, body)
    assert (response.status, answered(response)["error"]["param"]) == (400, param)
    assert upstream.requests == []


BAD_MESSAGES = [
    case("no messages", {"model": "opus"}, "messages: expected a list, got null"),
    case("empty messages", with_messages(), "messages: expected at least one message"),
    case(
        "messages is text",
        {"model": "opus", "messages": "hi"},
        "messages: expected a list, got a string",
    ),
    case("no model", {"messages": QUESTION["messages"]}, "model: expected a string, got null"),
]


@pytest.mark.parametrize(("body", "message"), BAD_MESSAGES)
def test_bad_messages_request_is_400_in_its_dialect(body: JSON, message: str) -> None:
    app, upstream = app_on(FINE)
    response = ask(app, MESSAGES, body)
    assert response.status == 400
    assert answered(response)["error"] == {"type": "invalid_request_error", "message": message}
    assert upstream.requests == []


LONE = b"\\ud83d"

LONE_SURROGATES = [
    case("in text", b'{"role": "user", "content": "a\\ud83db"}'),
    case("in a name of a member", b'{"role": "user", "content": "x", "\\ud83d": 1}'),
    case(
        "in the arguments of a call",
        b'{"role": "assistant", "tool_calls": [{"id": "t", "type": "function", "function": '
        b'{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud83d\\"}"}}]}',
    ),
]


@pytest.mark.parametrize("message", LONE_SURROGATES)
def test_lone_surrogates_are_replaced_as_anthropic_refuses_them(message: bytes) -> None:
    app, upstream = app_on(FINE)
    raw = b'{"model": "opus", "messages": [{"role": "user", "content": "x"}, %b]}' % message
    assert settled(ask(app, CHAT, raw)).status == 200
    assert LONE not in upstream.requests[0].body


def test_byte_order_mark_before_a_body_is_no_part_of_it() -> None:
    app, _ = app_on(FINE)
    assert settled(ask(app, CHAT, b"\xef\xbb\xbf" + json.dumps(QUESTION).encode())).status == 200


# --- responses

RESPONSES = "/v1/responses"
BOTH_KEYS = {"client_keys": CLIENT_KEYS}


def get(app: shim.App, path: str, owner: str = "", method: str = "GET") -> shim.Response:
    """What the client with one of the keys gets of a path."""
    return app.respond(shim.Request(method, path, {}, b"", "shim_1", key_name=owner))


def respond(app: shim.App, body: JSON, owner: str = "", path: str = RESPONSES) -> shim.Response:
    """What the client with one of the keys is answered, whole or streamed."""
    raw = json.dumps({"model": OPUS, **body}).encode()
    request = shim.Request("POST", path, {}, raw, "shim_1", key_name=owner)
    return settled(app.respond(request))


def responded(app: shim.App, body: JSON, owner: str = "") -> JSON:
    response = respond(app, body, owner)
    assert response.status == 200
    return json.loads(played(response))


def last_response(response: shim.Response) -> JSON:
    """The response that a stream ends with."""
    last: JSON = chunks(played(response))[-1]["response"]
    return last


@contextlib.contextmanager
def closing_app(*answers: Union[Answer, Exception], **policy: Any) -> Iterator[Any]:
    key_file = policy.pop("sealing_key_file", "")
    app, upstream = app_on(*answers, **policy)
    app.sealing_key_file = key_file
    try:
        yield app, upstream
    finally:
        app.close()


@pytest.mark.parametrize("stream", [False, True])
def test_responses_answer_streamed_or_not(stream: bool) -> None:
    with closing_app(FINE) as (app, upstream):
        response = respond(app, {"input": "hi", "stream": stream, "metadata": {"a": "b"}})
        made = last_response(response) if stream else json.loads(played(response))
    assert field(response, "x-request-id") == ["req_1"]
    assert upstream.bodies()[0]["messages"] == [user("hi")]
    assert re.fullmatch("resp_[0-9a-f]{48}", made["id"])
    assert abs(made["created_at"] - time.time()) < 60
    assert made["output"][0]["id"] == f"msg_{made['id'][5:]}_0"
    assert made["output"][0]["content"] == [text_part("Hell\u00f6 \u4e16\U0001f600")]
    told = [made[name] for name in ("status", "store", "metadata", "usage")]
    assert told == ["completed", True, {"a": "b"}, RESPONSE_USAGE]


def test_responses_id_is_new_each_time() -> None:
    with closing_app(FINE) as (app, _):
        assert responded(app, {"input": "hi"})["id"] != responded(app, {"input": "hi"})["id"]


def thoughtful(number: int) -> Answer:
    """A turn that thinks and calls a tool; each has a thought and a signature of its own."""
    return streamed(
        message_start(),
        block_start(0, type="thinking", thinking="", signature=""),
        block_delta(0, type="thinking_delta", thinking=f"thought {number}"),
        block_delta(0, type="signature_delta", signature=f"signature {number}"),
        block_stop(0),
        block_start(1, type="redacted_thinking", data=f"data {number}"),
        block_stop(1),
        tool_start(2, id=f"t{number}"),
        json_delta(2, f'{{"n":{number}}}'),
        block_stop(2),
        message_delta("tool_use"),
        MESSAGE_STOP,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_responses_keep_signed_thinking_over_five_turns_and_restarts(
    tmp_path: Path, stream: bool
) -> None:
    """By encrypted_content alone: nothing is stored, and each turn has a process of its own."""
    key = str(tmp_path / "claude-shim" / "sealing.key")
    items: List[JSON] = [{"role": "user", "content": "Go."}]
    messages = [user("Go.")]
    for number in range(1, 6):
        with closing_app(thoughtful(number), responses_store="off", sealing_key_file=key) as (
            app,
            upstream,
        ):
            body = {"input": items, "tools": [flat()], "store": False, "stream": stream}
            response = respond(app, body)
        assert field(response, "x-claude-shim-ignored") == []
        assert upstream.bodies()[0]["messages"] == messages
        made = last_response(response) if stream else json.loads(played(response))
        items = [*items, *made["output"], in_output(f"t{number}", f"result {number}")]
        messages = [
            *messages,
            assistant(
                thought(f"thought {number}", f"signature {number}"),
                {"type": "redacted_thinking", "data": f"data {number}"},
                use(f"t{number}", n=number),
            ),
            user(result(f"t{number}", f"result {number}")),
        ]


def test_responses_go_on_by_the_id_of_the_last() -> None:
    """The Agents SDK sends new items only; instructions are not inherited."""
    with closing_app(thoughtful(1), thoughtful(2), FINE) as (app, upstream):
        body = {"tools": [flat()]}
        one = responded(app, {**body, "input": "Go.", "instructions": "Be brief."})
        two = responded(
            app, {**body, "previous_response_id": one["id"], "input": [in_output("t1")]}
        )
        assert two["previous_response_id"] == one["id"]
        responded(app, {**body, "previous_response_id": two["id"], "input": [in_output("t2")]})
        listed = json.loads(get(app, f"{RESPONSES}/{two['id']}/input_items?order=asc").body)
    thoughts = [
        [
            thought(f"thought {n}", f"signature {n}"),
            {"type": "redacted_thinking", "data": f"data {n}"},
        ]
        for n in (1, 2)
    ]
    assert upstream.bodies()[2]["messages"] == [
        user("Go."),
        assistant(*thoughts[0], use("t1", n=1)),
        user(result("t1")),
        assistant(*thoughts[1], use("t2", n=2)),
        user(result("t2")),
    ]
    assert upstream.bodies()[0]["system"] == [says("Be brief.")]
    assert "system" not in upstream.bodies()[2]
    types = [item["type"] for item in listed["data"]]
    assert types == ["message", "reasoning", "reasoning", "function_call", "function_call_output"]


def test_responses_items_may_be_named_by_id() -> None:
    """The Vercel AI SDK's way, unless it is told not to store."""
    with closing_app(thoughtful(1), FINE) as (app, upstream):
        made = responded(app, {"input": "Go.", "tools": [flat()]})
        references = [{"type": "item_reference", "id": item["id"]} for item in made["output"]]
        items = [{"role": "user", "content": "Go."}, *references, in_output("t1")]
        responded(app, {"input": items, "tools": [flat()]})
    assert upstream.bodies()[1]["messages"][1]["content"][0]["signature"] == "signature 1"


def test_responses_are_kept_shown_and_deleted() -> None:
    with closing_app(FINE) as (app, _):
        made = responded(app, {"input": "hi"})
        path = f"{RESPONSES}/{made['id']}"
        assert json.loads(get(app, path).body) == made
        listed = json.loads(get(app, f"{path}/input_items").body)
        item = {
            "id": f"item_0_{made['id']}",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_text", "text": "hi"}],
        }
        ends = {"first_id": item["id"], "last_id": item["id"], "has_more": False}
        assert listed == {"object": "list", "data": [item], **ends}
        gone = {"id": made["id"], "object": "response", "deleted": True}
        assert json.loads(get(app, path, method="DELETE").body) == gone
        for method, where in (("GET", path), ("DELETE", path), ("GET", f"{path}/input_items")):
            response = get(app, where, method=method)
            assert response.status == 404
            message = f"Response with id '{made['id']}' not found."
            assert json.loads(response.body)["error"]["message"] == message
        again = respond(app, {"input": "hi", "previous_response_id": made["id"]})
    assert again.status == 400
    assert json.loads(again.body)["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize(
    ("fields", "policy"), [({"store": False}, {}), ({}, {"responses_store": "off"})]
)
@pytest.mark.parametrize("stream", [False, True])
def test_responses_that_are_not_to_be_stored_are_not(
    fields: JSON, policy: JSON, stream: bool
) -> None:
    with closing_app(FINE, **policy) as (app, _):
        response = respond(app, {"input": "hi", "stream": stream, **fields})
        made = last_response(response) if stream else json.loads(played(response))
        assert made["store"] is False
        assert get(app, f"{RESPONSES}/{made['id']}").status == 404
        reference = [{"type": "item_reference", "id": made["output"][0]["id"]}]
        assert respond(app, {"input": reference}).status == 400


def test_responses_that_failed_are_not_stored() -> None:
    with closing_app(streamed(*TEXT_EVENTS[:4])) as (app, _):
        made = last_response(respond(app, {"input": "hi", "stream": True}))
        assert made["status"] == "failed"
        assert get(app, f"{RESPONSES}/{made['id']}").status == 404


def test_responses_go_on_after_a_compaction_and_do_not_compact_again() -> None:
    with closing_app(FINE, FINE) as (app, _):
        compacted = responded(app, {"input": [user("one"), {"type": "compaction_trigger"}]})
        assert [item["type"] for item in compacted["output"]] == ["compaction"]
        more = {"input": "two", "previous_response_id": compacted["id"]}
        assert [item["type"] for item in responded(app, more)["output"]] == ["message"]


def test_responses_belong_to_the_key_that_asked() -> None:
    with closing_app(FINE, **BOTH_KEYS) as (app, upstream):
        made = responded(app, {"input": "secret"}, "ann")
        path = f"{RESPONSES}/{made['id']}"
        assert get(app, path, "ann").status == 200
        for owner in ("bob", ""):
            assert get(app, path, owner).status == 404
            assert get(app, f"{path}/input_items", owner).status == 404
            assert get(app, path, owner, "DELETE").status == 404
            more = {"input": "hi", "previous_response_id": made["id"]}
            assert respond(app, more, owner).status == 400
            reference = {"type": "item_reference", "id": made["output"][0]["id"]}
            assert respond(app, {"input": [reference]}, owner).status == 400
        assert get(app, path, "ann").status == 200
    assert len(upstream.requests) == 1


def test_responses_belong_to_the_key_and_not_to_its_line() -> None:
    before, after = shim.ClientKeys({"line 1": "k1"}), shim.ClientKeys({"line 1": "new", "x": "k1"})
    with closing_app(FINE, client_keys=before) as (app, _):
        path = f"{RESPONSES}/{responded(app, {'input': 'secret'}, 'line 1')['id']}"
        app.policy = app.policy._replace(client_keys=after)  # as SIGHUP does it
        assert get(app, path, "line 1").status == 404
        assert get(app, path, "x").status == 200


def test_responses_belong_to_the_credential_that_was_passed_on() -> None:
    upstream = ScriptedUpstream(FINE)
    app = shim.App(upstream, shim.Passthrough(), shim.Policy(live_models=False))
    with contextlib.closing(app):
        shown = {"x_api_key": "sk-ann"}
        made = answered(ask(app, RESPONSES, {"model": OPUS, "input": "hi"}, **shown))
        path = f"{RESPONSES}/{made['id']}"
        assert fetch(app, path, **shown).status == 200
        assert fetch(app, path, x_api_key="sk-bob").status == 404
        assert fetch(app, path).status == 401


STATUSES = [
    case(
        "no such model: Codex would ask six times", {"model": "gpt-9"}, FINE, 400, "model_not_found"
    ),
    case(
        "upstream knows no such model",
        {},
        refused(404, "not_found_error", "model: x"),
        400,
        "model_not_found",
    ),
    case("too large", {}, refused(413, "request_too_large", "x"), 400, "request_too_large"),
    case("overloaded", {}, refused(529, "overloaded_error", "x"), 503, "server_is_overloaded"),
    case(
        "too long",
        {},
        refused(400, "invalid_request_error", "prompt is too long: 9"),
        400,
        "context_length_exceeded",
    ),
    case("a wrong key", {}, refused(401, "authentication_error", "x"), 401, "invalid_api_key"),
    case("an item that is not there", {"input": [{"id": "msg_9"}]}, FINE, 400, "not_found"),
]


@pytest.mark.parametrize(("fields", "upstream", "status", "code"), STATUSES)
def test_responses_refusals_are_not_repeated_by_codex(
    fields: JSON, upstream: Answer, status: int, code: str
) -> None:
    with closing_app(upstream) as (app, _):
        response = respond(app, {"input": "hi", **fields})
    assert (response.status, json.loads(response.body)["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("failure", "client", "status"),
    [
        case(
            "a time-out, for Codex",
            shim.UpstreamTimeoutError("x"),
            {"originator": "codex_exec"},
            400,
        ),
        case("a time-out, for others", shim.UpstreamTimeoutError("x"), {}, 504),
        case(
            "no connection: Codex may try",
            shim.UpstreamUnreachableError("x"),
            {"originator": "codex_exec"},
            502,
        ),
        case(
            "overload: Codex tries five times",
            refused(529, "overloaded_error", "x", x_should_retry="false"),
            {"originator": "codex_exec"},
            503,
        ),
        case(
            "a failure that trying again did not mend",
            refused(500, "api_error", "x", x_should_retry="false"),
            {"originator": "codex_exec"},
            400,
        ),
    ],
)
def test_responses_that_are_final_are_so_for_codex(failure: Any, client: Any, status: int) -> None:
    """It ignores x-should-retry, and would ask thirty times."""
    with closing_app(failure) as (app, _):
        assert ask(app, RESPONSES, {"model": OPUS, "input": "hi"}, **client).status == status


def test_responses_name_what_had_no_effect() -> None:
    with closing_app(FINE) as (app, _):
        response = respond(app, {"input": "hi", "truncation": "auto", "tools": [{"type": "mcp"}]})
        assert field(response, "x-claude-shim-ignored") == ["tools.mcp,truncation"]
    with closing_app(FINE, strict=True) as (app, _):
        assert respond(app, {"input": "hi", "truncation": "auto"}).status == 400


def test_responses_count_input_tokens() -> None:
    with closing_app(in_json(200, {"input_tokens": 42})) as (app, upstream):
        body = {
            "input": "hi",
            "instructions": "a",
            "tools": [flat()],
            "max_output_tokens": 9,
            "user": "u",
        }
        response = respond(app, body, path=f"{RESPONSES}/input_tokens")
    told = {"object": "response.input_tokens", "input_tokens": 42}
    assert json.loads(response.body) == told
    (request,) = upstream.requests
    assert request.path == "/v1/messages/count_tokens"
    assert dict(request.headers)["x-api-key"] == "sk-ant-api03-upstream"
    assert json.loads(request.body) == {
        "model": OPUS,
        "system": [says("a")],
        "messages": [user("hi")],
        "tools": [tool()],
    }


def test_responses_input_tokens_are_estimated_where_nobody_counts() -> None:
    with closing_app(in_json(404, {})) as (app, _):
        response = respond(app, {"input": "hi"}, path=f"{RESPONSES}/input_tokens")
    assert 20 < json.loads(response.body)["input_tokens"] < 60
    assert field(response, "x-claude-shim-estimate") == ["true"]


def test_responses_input_tokens_refused_by_upstream() -> None:
    with closing_app(refused(429, "rate_limit_error", "x")) as (app, _):
        response = respond(app, {"input": "hi"}, path=f"{RESPONSES}/input_tokens")
    assert response.status == 429


@pytest.mark.parametrize(
    "given", ["hi", [{"role": "user", "content": "hi"}], [GREETING, in_call("t1"), in_output("t1")]]
)
def test_responses_compact_keeps_what_the_user_said(given: Any) -> None:
    with closing_app(FINE) as (app, upstream):
        response = respond(app, {"input": given}, path=f"{RESPONSES}/compact")
        made = json.loads(response.body)
        kept, summary = made["output"]
        assert kept == {
            "id": f"item_0_{made['id']}",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_text", "text": "hi"}],
        }
        assert (made["object"], made["usage"]) == ("response.compaction", RESPONSE_USAGE)
        assert upstream.bodies()[0]["messages"][-1]["content"][-1] == says(shim.SUMMARISE)
        responded(app, {"input": [summary, GREETING]})
        text = "<conversation-summary>\nHell\u00f6 \u4e16\U0001f600\n</conversation-summary>"
        assert upstream.bodies()[1]["messages"] == [user(text, "hi")]


def test_responses_compact_without_a_summary_is_an_error() -> None:
    with closing_app(streamed(message_start(), message_delta("end_turn"), MESSAGE_STOP)) as (
        app,
        _,
    ):
        response = respond(app, {"input": "hi"}, path=f"{RESPONSES}/compact")
    assert response.status == 502
    assert "no summary" in json.loads(response.body)["error"]["message"]


def test_responses_search_of_the_web_may_pause() -> None:
    start, use_, pause = (
        message_start(),
        block_start(0, type="server_tool_use", id="s1", name="web_search", input={}),
        message_delta("pause_turn"),
    )
    first = streamed(
        start, use_, json_delta(0, '{"query":"q"}'), block_stop(0), pause, MESSAGE_STOP
    )
    found = block_start(0, type="web_search_tool_result", tool_use_id="s1", content=FOUND)
    second = streamed(start, found, block_stop(0), message_delta("end_turn"), MESSAGE_STOP)
    with closing_app(first, second) as (app, upstream):
        made = responded(app, {"input": "hi", "tools": [{"type": "web_search"}]})
    assert [item["status"] for item in made["output"]] == ["completed"]
    assert made["output"][0]["action"]["sources"] == [{"type": "url", "url": "https://w.example"}]
    assert len(upstream.requests) == 2


OTHER_PATHS = [
    case("cancel of an unknown one", "POST", "/resp_1/cancel", 404, "'resp_1' not found"),
    case("a stream of what is stored", "GET", "/resp_1?stream=true", 400, "whole"),
    case("a list of all", "GET", "", 404, "lists no responses"),
    case("an unknown one", "GET", "/resp_1", 404, "'resp_1' not found"),
    case("something below one", "GET", "/resp_1/output", 404, "'resp_1/output' not found"),
]


@pytest.mark.parametrize(("method", "path", "status", "reason"), OTHER_PATHS)
def test_responses_paths(method: str, path: str, status: int, reason: str) -> None:
    with closing_app(FINE) as (app, _):
        response = get(app, RESPONSES + path, method=method)
    assert response.status == status
    assert reason in json.loads(response.body)["error"]["message"]


def test_stored_response_cannot_be_cancelled() -> None:
    with closing_app(FINE) as (app, _):
        asked = {"model": "sonnet", "input": "hi"}
        id = answered(ask(app, RESPONSES, asked))["id"]
        response = get(app, f"{RESPONSES}/{id}/cancel", method="POST")
    assert response.status == 400
    assert "background" in json.loads(response.body)["error"]["message"]


PAGES = [
    case("newest first", "", ["c", "b", "a"], False),
    case("oldest first", "?order=asc", ["a", "b", "c"], False),
    case("a limit", "?limit=2", ["c", "b"], True),
    case("after one", "?after=b&order=asc", ["c"], False),
    case("after an unknown one", "?after=x", ["c", "b", "a"], False),
    case("nonsense", "?limit=-1&order=up", ["c", "b", "a"], False),
    case("no page at all", "?limit=0", ["c"], True),
    case("more digits than Python converts", f"?limit={'9' * 5000}", ["c", "b", "a"], False),
]


@pytest.mark.parametrize(("query", "expected", "more"), PAGES)
def test_responses_page_of_items(query: str, expected: List[str], more: bool) -> None:
    page = shim.item_page([{"id": "a"}, {"id": "b"}, {"id": "c"}], f"/v1/x/input_items{query}")
    assert ([item["id"] for item in page["data"]], page["has_more"]) == (expected, more)


# --- the store of responses


class Clock:
    """The time, as a test sets it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def stored(id: str, previous: Optional[str] = None, text: str = "a") -> JSON:
    item = {"id": f"msg_{id}", "content": text}
    return {"id": id, "previous_response_id": previous, "output": [item]}


@contextlib.contextmanager
def a_store(place: str = "memory", clock: Optional[Clock] = None) -> Iterator[shim.ResponseStore]:
    with contextlib.closing(shim.ResponseStore(place, clock or Clock())) as store:
        yield store


def kept(store: shim.ResponseStore, *response: Any) -> None:
    store.put(*response)
    store.save()


def test_store_forgets_what_nobody_used_for_a_day() -> None:
    clock = Clock()
    with a_store(clock=clock) as store:
        kept(store, "ann", [], stored("r1"))
        kept(store, "ann", [], stored("r2"))
        clock.now += 20 * 3600
        assert store.response("ann", "r1") == stored("r1")
        clock.now += 5 * 3600
        kept(store, "ann", [], stored("r3"))
        assert store.response("ann", "r1") == stored("r1")
        assert store.response("ann", "r2") is None
        assert store.item("ann", "msg_r2") is None


def test_store_forgets_the_least_lately_used_when_it_is_full() -> None:
    clock = Clock()
    with a_store(clock=clock) as store:
        store.max_bytes = 3000
        for number in range(4):
            clock.now += 1
            kept(store, "ann", [], stored(f"r{number}", text="x" * 600))
        clock.now += 1
        assert store.response("ann", "r0") is not None
        clock.now += 1
        kept(store, "ann", [], stored("r4", text="x" * 600))
        found = [store.response("ann", f"r{number}") is not None for number in range(5)]
    assert found == [True, False, True, True, True]


def test_store_keeps_all_of_a_conversation_that_goes_on() -> None:
    clock = Clock()
    with a_store(clock=clock) as store:
        kept(store, "ann", [{"n": 1}], stored("r1"))
        kept(store, "ann", [{"n": 2}], stored("r2", "r1"))
        for number in range(3, 9):
            clock.now += 20 * 3600
            expected = [{"n": 1}, *stored("r1")["output"], {"n": 2}, *stored("r2")["output"]]
            assert store.history("ann", "r2") == expected
            kept(store, "ann", [], stored(f"r{number}"))
        assert store.delete("ann", "r1")
        assert store.history("ann", "r2") is None


def test_store_in_a_file_lasts_and_is_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "responses.db"
    with a_store(str(file)) as store, a_store(str(file)) as beside:
        kept(store, "ann", [{"n": 1}], stored("r1"))
        assert beside.history("ann", "r1") == [{"n": 1}, *stored("r1")["output"]]
        if os.name == "posix":
            modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
            assert modes == {0o600}
    with a_store(str(file)) as store:
        assert store.item("ann", "msg_r1") == stored("r1")["output"][0]
        assert store.item("bob", "msg_r1") is None


def test_store_in_memory_that_is_shared_is_a_file_and_waits_for_what_is_being_written(
    tmp_path: Path,
) -> None:
    with a_store() as store, a_store() as beside:
        for each in (store, beside):
            each.share(str(tmp_path / "shared"))
        store.put("ann", [{"n": 1}], stored("r1"))
        writing = threading.Thread(target=store.save)
        writing.start()
        assert beside.history("ann", "r1") == [{"n": 1}, *stored("r1")["output"]]
        writing.join()
        assert beside.item("ann", "msg_r1") == stored("r1")["output"][0]
        beside.patience = 0.0
        assert beside.response("bob", "r1") is None


def test_response_is_not_lost_while_others_write_to_the_store(tmp_path: Path) -> None:
    """Four busy workers had each other wait for more than half a second."""
    file = tmp_path / "shared"
    with a_store() as store:
        store.share(str(file))
        other = sqlite3.connect(file, isolation_level=None)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            store.put("ann", [], stored("r1"))
            writing = threading.Thread(target=store.save)
            writing.start()
            writing.join(0.8)
            other.execute("COMMIT")
            writing.join()
        assert store.response("ann", "r1") == stored("r1")


def test_store_that_fails_costs_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "responses.db"
    file.write_bytes(b"no database" * 100)
    log = io.StringIO()
    with closing_app(FINE, responses_store=str(file)) as (app, _):
        app.log = shim.Log(log)
        made = responded(app, {"input": "hi"})
        response = get(app, f"{RESPONSES}/{made['id']}")
    assert response.status == 500
    assert "the store of responses" in json.loads(response.body)["error"]["message"]
    assert log.getvalue().startswith("note: a response was not stored: the store of responses (")


def test_store_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    place = str(tmp_path / "gone" / "responses.db")
    settings = settings_of("--upstream", "echo", "--port", "0", "--responses-store", place)
    with pytest.raises(shim.ConfigError, match=r"^--responses-store: the store of responses"):
        shim.server_from(settings, {"HOME": str(tmp_path)}, io.StringIO())


def test_store_takes_requests_at_the_same_time() -> None:
    with a_store() as store:

        def put(number: int) -> None:
            for n in range(20):
                kept(store, "ann", [], stored(f"r{number}_{n}"))

        threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [store.response("ann", f"r{a}_{b}") for a in range(4) for b in range(20)]
    assert None not in found


# --- the key of the envelopes


def test_sealing_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "sealing.key"
    key = shim.kept_key(str(path))
    assert shim.kept_key(str(path)) == key
    assert len(key) == 32
    assert [file.name for file in path.parent.iterdir()] == ["sealing.key"]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_sealing_key_without_a_file_is_new_each_time() -> None:
    assert shim.kept_key("") != shim.kept_key("")


def test_sealing_key_is_made_when_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "sealing.key"
    with closing_app(FINE, sealing_key_file=str(path)) as (app, _):
        answered(ask(app, CHAT, QUESTION))
        assert not path.exists()
        responded(app, {"input": "hi"})
        assert path.exists()


@ON_POSIX
def test_sealing_key_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sealing.key")
    with pytest.raises(OSError, match="no regular file"):
        shim.kept_key(str(tmp_path / "sealing.key"))


@ON_POSIX
def test_sealing_key_that_others_can_read_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "sealing.key"
    shim.kept_key(str(path))
    path.chmod(0o644)
    with pytest.raises(OSError, match="can be read by others: run chmod 600"):
        shim.kept_key(str(path))


@pytest.mark.parametrize("text", ["", "short", "z" * 64, "\u00e9" * 64])
def test_sealing_key_file_that_holds_none_is_told_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sealing.key"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    log = io.StringIO()
    with closing_app(FINE, sealing_key_file=str(path)) as (app, _):
        app.log = shim.Log(log)
        assert len(app.sealing_key()) == 32
        assert app.sealing_key() == app.sealing_key()
    assert path.read_text(encoding="utf-8") == text
    assert "note: sealed thinking ends with this process: " in log.getvalue()


@pytest.mark.parametrize("config", [None, "my.ini"])
def test_sealing_key_stands_beside_the_configuration(tmp_path: Path, config: Optional[str]) -> None:
    base = tmp_path / "claude-shim"
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "APPDATA": str(tmp_path)}
    path = shim.config_path(environment) if config is None else str(base / config)
    assert shim.sealing_key_path(path) == str(base / "sealing.key")


# --- relayed requests

ODD_JSON = (
    b'\n{ "model" : "claude-opus-5-5",\r\n "future": [1.0, 1e2, "\\u00e9\xc3\xa9\\/", "model"],'
    b' "messages":[{"role":"user","content":"a \\ud83d"}], "metadata":{"model":"opus"} } '
)


def test_messages_go_up_and_come_down_byte_for_byte() -> None:
    body = b'{"id" : "msg_01","content":[ ], "new": 1.0}\n'
    app, upstream = app_on((200, {"content-type": "application/json"}, [body[:9], body[9:]]))
    response = ask(app, "/v1/messages?beta=true", ODD_JSON)
    assert upstream.requests[0].body == ODD_JSON
    assert (upstream.requests[0].method, upstream.requests[0].path) == (
        "POST",
        "/v1/messages?beta=true",
    )
    assert (response.status, played(response), response.model) == (200, body, "claude-opus-5-5")


ALIASES_IN_BODIES = [
    case("an alias", b'"opus"', b'"claude-opus-5-5"'),
    case("an escape in it", b'"op\\u0075s"', b'"claude-opus-5-5"'),
    case("a prefix", b'"anthropic/claude-opus-5"', b'"claude-opus-5"'),
    case("a Claude that nobody knows", b'"claude-opus-9"', b'"claude-opus-9"'),
]


@pytest.mark.parametrize(("name", "expected"), ALIASES_IN_BODIES)
def test_messages_alias_is_replaced_in_its_place_alone(name: bytes, expected: bytes) -> None:
    app, upstream = app_on(FINE)
    ask(app, MESSAGES, ODD_JSON.replace(b'"claude-opus-5-5"', name))
    assert upstream.requests[0].body == ODD_JSON.replace(b'"claude-opus-5-5"', expected)


def test_messages_headers_that_go_up() -> None:
    """D2: what is Anthropic's is forwarded unchanged; the client's credential never is."""
    app, upstream = app_on(FINE)
    ask(
        app,
        MESSAGES,
        QUESTION,
        anthropic_version="2099-01-01",
        anthropic_beta="a-1, b-2,a-1",
        anthropic_new_thing="x",
        user_agent="claude-cli/9",
        x_stainless_lang="js",
        x_claude_code_session_id="s",
        content_type="application/json; charset=utf-8",
        accept="*/*",
        authorization="Bearer of-the-client",
        x_api_key="of-the-client",
        api_key="of-the-client",
        x_claude_shim_key="of-the-client",
        proxy_authorization="Basic of-the-client",
        cookie="of-the-client",
        host="127.0.0.1:8765",
        connection="keep-alive",
        content_length="9",
        transfer_encoding="chunked",
        accept_encoding="zstd",
        x_forwarded_for="10.0.0.1",
    )
    assert sorted(upstream.requests[0].headers) == [
        ("accept", "*/*"),
        ("anthropic-beta", "a-1, b-2,a-1"),
        ("anthropic-new-thing", "x"),
        ("anthropic-version", "2099-01-01"),
        ("content-type", "application/json; charset=utf-8"),
        ("user-agent", "claude-cli/9"),
        ("x-api-key", "sk-ant-api03-upstream"),
        ("x-claude-code-session-id", "s"),
        ("x-stainless-lang", "js"),
    ]


def test_messages_without_a_version_get_the_one_there_is() -> None:
    """S4-B27."""
    app, upstream = app_on(FINE)
    ask(app, MESSAGES, QUESTION)
    assert ("anthropic-version", "2023-06-01") in upstream.requests[0].headers


PASSED_THROUGH = [
    case(
        "a client key beside the client's own",
        {"x-claude-shim-key": "key-of-ann", "x-api-key": "sk-ant-api03-c"},
        [("x-api-key", "sk-ant-api03-c")],
    ),
    case(
        "a client key in Authorization beside the client's own",
        {"authorization": "Bearer key-of-ann", "x-api-key": "sk-ant-api03-c"},
        [("x-api-key", "sk-ant-api03-c")],
    ),
    case(
        "a client key as x-api-key beside the client's own",
        {"x-api-key": "key-of-ann", "authorization": "Bearer sk-ant-oat01-c"},
        [("authorization", "Bearer sk-ant-oat01-c")],
    ),
    case("a client key and nothing else", {"x-api-key": "key-of-ann"}, None),
    case("a client key as bearer and nothing else", {"authorization": "Bearer key-of-ann"}, None),
]


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(("client", "expected"), PASSED_THROUGH)
def test_client_key_never_goes_upstream(client: Dict[str, str], expected: Any, path: str) -> None:
    """Also beside --auth passthrough; without a key of its own the client is told so."""
    upstream = ScriptedUpstream(FINE)
    policy = shim.Policy(client_keys=CLIENT_KEYS, live_models=False)
    app = shim.App(upstream, shim.Passthrough(), policy)
    assert app.admit("POST", path, client) == "ann"
    response = settled(
        app.respond(shim.Request("POST", path, client, json.dumps(QUESTION).encode()))
    )
    shown = [
        [header for header in request.headers if header[0] in CLIENT_HEADERS]
        for request in upstream.requests
    ]
    assert (response.status, shown) == ((401, []) if expected is None else (200, [expected]))


def test_messages_headers_that_come_down() -> None:
    told = {
        "anthropic_ratelimit_unified_status": "allowed",
        "anthropic_organization_id": "org",
        "retry_after": "1",
        "set_cookie": "c=1",
        "server": "cloudflare",
        "transfer_encoding": "chunked",
    }
    app, _ = app_on(streamed(*TEXT_EVENTS, **told))
    assert sorted(ask(app, MESSAGES, {**QUESTION, "stream": True}).headers) == [
        ("anthropic-organization-id", "org"),
        ("anthropic-ratelimit-unified-status", "allowed"),
        ("content-type", "text/event-stream"),
        ("request-id", "req_1"),
        ("retry-after", "1"),
        ("x-request-id", "req_1"),
    ]


def relayed(*bursts: bytes) -> Tuple[bytes, bool]:
    """What the client gets of a stream that ends after `bursts`, and whether it was whole."""
    transform = shim.RelayTransform()
    made = b"".join([transform.feed(burst) for burst in bursts]) + transform.end()
    return made, transform.complete


def test_relayed_error_event_is_the_end_and_yet_not_whole() -> None:
    """Nothing is added, and the body stays unterminated."""
    failed = sse(*TEXT_EVENTS[:4], {"type": "error", "error": {}})
    assert relayed(failed) == (failed, False)


CUT_EVENT = (
    b'event: error\ndata: {"type":"error","error":{"type":"api_error",'
    b'"message":"upstream ended in the middle of the answer"}}\n\n'
)
RELAYED = sse(*TEXT_EVENTS)


def test_relayed_stream_is_whole_in_any_two_pieces() -> None:
    for cut in range(len(RELAYED) + 1):
        assert relayed(RELAYED[:cut], RELAYED[cut:]) == (RELAYED, True)


def test_relayed_stream_is_whole_byte_by_byte() -> None:
    assert relayed(*(bytes([byte]) for byte in RELAYED)) == (RELAYED, True)


def test_relayed_stream_cut_anywhere_ends_in_an_error_event() -> None:
    """S3-B11, S3-B13: a stream that breaks off must not look finished, nor end in half an event."""
    for cut in range(len(RELAYED)):
        whole_events = (
            RELAYED[: RELAYED[:cut].rfind(b"\n\n") + 2] if b"\n\n" in RELAYED[:cut] else b""
        )
        assert relayed(RELAYED[:cut]) == (whole_events + CUT_EVENT, False)


@pytest.mark.parametrize(
    "ending", [case("LF", b"\n"), case("CRLF", b"\r\n"), case("CR, as the standard allows", b"\r")]
)
def test_relayed_stream_with_any_line_ending(ending: bytes) -> None:
    raw = RELAYED.replace(b"\n", ending)
    assert relayed(raw) == (raw, True)
    assert relayed(raw[:-40])[1] is False


RELAYED_ENDS = [
    case("a comment after the end", sse(MESSAGE_STOP) + b": bye\n\n", True),
    case("a ping after the end", sse(MESSAGE_STOP, PING), True),
    case("many pings after the end", sse(MESSAGE_STOP, *[PING] * 9), True),
    case("nothing at all", b"", False),
    case("a ping alone", sse(PING), False),
    case("the words in a text", sse(text_delta(0, "event: message_stop\n\n")), False),
    case("the words in JSON in a text", sse(text_delta(0, '{"type":"message_stop"}')), False),
    case("the words in a tool's input", sse(json_delta(0, '{"type":"message_stop"}')), False),
    case(
        "the words in a block of a search",
        sse(block_start(0, type="x", content={"type": "error", "code": "busy"})),
        False,
    ),
]


@pytest.mark.parametrize(("rest", "whole"), RELAYED_ENDS)
def test_relayed_stream_knows_its_end(rest: bytes, whole: bool) -> None:
    made, complete = relayed(sse(*TEXT_EVENTS[:4]), rest)
    assert complete is whole
    assert made == sse(*TEXT_EVENTS[:4]) + rest + (b"" if whole else CUT_EVENT)


def test_relayed_stream_says_why_it_was_cut() -> None:
    lost = shim.UpstreamTimeoutError("upstream fell silent")
    app, _ = app_on((200, FINE[1], [sse(*TEXT_EVENTS[:4]), lost]))
    raw = played(ask(app, MESSAGES, {**QUESTION, "stream": True}))
    error = {"type": "timeout_error", "message": "upstream fell silent"}
    assert raw == sse(*TEXT_EVENTS[:4], {"type": "error", "error": error})


def test_relayed_stream_is_filled_with_pings() -> None:
    assert shim.RelayTransform.heartbeat == b'event: ping\ndata: {"type": "ping"}\n\n'


def test_relayed_body_that_is_cut_is_not_complete() -> None:
    transform = shim.Transform()
    transform.feed(b'{"id"')
    transform.end(shim.UpstreamCutError("cut"))
    assert not transform.complete


RELAYED_PATHS = [
    case("batches", "POST", "/v1/messages/batches?limit=1", "/v1/messages/batches?limit=1"),
    case("a batch", "GET", "/messages/batches/b_1/results", "/v1/messages/batches/b_1/results"),
    case("a batch to be deleted", "DELETE", "/v1/messages/batches/b_1", "/v1/messages/batches/b_1"),
    case("skills", "GET", "/v1/skills/s_1", "/v1/skills/s_1"),
    case("files", "GET", "/v1/files/file_1/content", "/v1/files/file_1/content"),
]


@pytest.mark.parametrize(("method", "path", "expected"), RELAYED_PATHS)
def test_other_endpoints_of_anthropic_are_relayed(method: str, path: str, expected: str) -> None:
    app, upstream = app_on((200, {"content-type": "application/x-jsonl"}, [b"{}\n{}\n"]))
    headers = {"anthropic-version": "2023-06-01"}
    app.admit(method, path, headers)
    response = app.respond(shim.Request(method, path, headers, b"\x00\xff", "shim_1"))
    assert (response.status, played(response)) == (200, b"{}\n{}\n")
    request = upstream.requests[0]
    assert (request.method, request.path, request.body) == (method, expected, b"\x00\xff")


def test_files_of_openai_are_not_anthropics() -> None:
    app, upstream = app_on(FINE)
    response = ask(app, "/v1/files", {})
    assert response.status == 404
    assert answered(response)["error"]["code"] == "unsupported_endpoint"
    assert upstream.requests == []


# --- counting tokens


def test_count_tokens_is_relayed() -> None:
    app, upstream = app_on(in_json(200, {"input_tokens": 9}))
    response = ask(app, "/v1/messages/count_tokens?beta=true", {**QUESTION, "model": "opus"})
    assert answered(response) == {"input_tokens": 9}
    assert upstream.requests[0].path == "/v1/messages/count_tokens?beta=true"
    assert upstream.bodies() == [QUESTION]
    assert field(response, "x-claude-shim-estimate") == []


@pytest.mark.parametrize("status", [404, 405, 501])
def test_count_tokens_is_estimated_where_upstream_cannot(status: int) -> None:
    """S4-B19: 0 on any error."""
    app, _ = app_on(refused(status, "not_found_error", "no such endpoint"))
    response = ask(app, "/v1/messages/count_tokens", b'{"model":"opus","messages":[]}  ')
    assert (response.status, answered(response)) == (200, {"input_tokens": 10})  # 32 / 3.2
    assert field(response, "x-claude-shim-estimate") == ["true"]


@pytest.mark.parametrize("status", [400, 401, 429, 500, 529])
def test_count_tokens_does_not_hide_other_failures(status: int) -> None:
    app, _ = app_on(refused(status, "api_error", "x"))
    assert ask(app, "/v1/messages/count_tokens", QUESTION).status == status


# --- models

LIVE_LIST = {
    "data": [
        {
            "type": "model",
            "id": "claude-sonnet-6",
            "display_name": "Claude Sonnet 6",
            "created_at": "2026-11-01T00:00:00Z",
            "max_input_tokens": 2_000_000,
            "max_tokens": 256_000,
            "new_field": True,
        },
        {"type": "model", "id": "claude-opus-4-8", "created_at": "2026-01-01T00:00:00Z"},
    ],
    "has_more": False,
}


def test_models_for_both_sdks() -> None:
    app, upstream = app_on(FINE)
    body = answered(fetch(app, "/v1/models?limit=1000"))
    assert (body["object"], body["has_more"]) == ("list", False)
    assert (body["first_id"], body["last_id"]) == ("claude-opus-5-5", "claude-mythos-5")
    entry = body["data"][0]
    assert {**entry, "capabilities": None} == {
        "id": "claude-opus-5-5",
        "type": "model",
        "object": "model",
        "display_name": "claude-opus-5-5",
        "created": 0,
        "created_at": "1970-01-01T00:00:00Z",
        "owned_by": "anthropic",
        "max_input_tokens": 1_000_000,
        "max_tokens": 128_000,
        "context_length": 1_000_000,
        "max_model_len": 1_000_000,
        "max_output_tokens": 128_000,
        "capabilities": None,
        "architecture": {
            "input_modalities": ["text", "image", "file"],
            "output_modalities": ["text"],
        },
        "supported_parameters": ["tools", "tool_choice", "reasoning", "response_format", "stop"],
    }
    assert answered(fetch(app, "/v1/chat/models")) == body
    assert answered(fetch(app, "/models")) == body
    assert upstream.requests == []


def test_models_of_upstream_have_the_last_word() -> None:
    """S3-B24: a static list with retired ids and an invented date."""
    app, upstream = app_on(in_json(200, LIVE_LIST), live_models=True)
    body = answered(fetch(app, "/v1/models"))
    assert [entry["id"] for entry in body["data"]] == ["claude-sonnet-6", "claude-opus-4-8"]
    entry = body["data"][0]
    assert (entry["created"], entry["object"], entry["new_field"]) == (1_793_491_200, "model", True)
    assert (entry["context_length"], entry["max_output_tokens"]) == (2_000_000, 256_000)
    assert entry["created_at"] == "2026-11-01T00:00:00Z"
    assert answered(fetch(app, "/v1/models")) == body
    assert [request.path for request in upstream.requests] == ["/v1/models?limit=1000"]
    assert ("x-api-key", "sk-ant-api03-upstream") in upstream.requests[0].headers


def test_model_aliases_follow_upstreams_list() -> None:
    app, _ = app_on(in_json(200, LIVE_LIST), live_models=True)
    assert answered(fetch(app, "/v1/models/sonnet"))["id"] == "claude-sonnet-6"
    assert answered(fetch(app, "/v1/models/opus"))["id"] == "claude-opus-4-8"


@pytest.mark.parametrize(
    "scripted",
    [
        case("upstream refuses", refused(401, "authentication_error", "x")),
        case("upstream has none", in_json(200, {"data": []})),
        case("upstream says something else", in_json(200, {"data": "x"})),
        case("upstream shows a web page", web_page(200)),
        case("odd entries", in_json(200, {"data": [5, {"id": 5}]})),
        case("no connection", shim.UpstreamUnreachableError("x")),
    ],
)
def test_models_of_the_table_where_upstream_tells_none(scripted: Any) -> None:
    app, upstream = app_on(scripted, live_models=True)
    body = answered(fetch(app, "/v1/models"))
    assert body["data"][0]["id"] == "claude-opus-5-5"
    fetch(app, "/v1/models")
    assert len(upstream.requests) == 1  # not asked again at once


def test_models_are_fetched_beside_the_first_request() -> None:
    app, upstream = app_on(in_json(200, LIVE_LIST), live_models=True)
    ask(app, CHAT, {**QUESTION, "max_tokens": 9})
    app.close()
    assert {request.path for request in upstream.requests} == {
        "/v1/models?limit=1000",
        "/v1/messages",
    }


MODEL_PATHS = [
    case("an id", "/v1/models/claude-opus-4-6", "claude-opus-4-6"),
    case("an alias", "/v1/models/haiku", "claude-haiku-5-5"),
    case("a prefix in percent signs", "/v1/models/anthropic%2Fclaude-opus-5", "claude-opus-5"),
    case("a prefix as it is", "/v1/models/anthropic/claude-opus-5", "claude-opus-5"),
    case("a Claude that nobody knows", "/models/claude-opus-9", "claude-opus-9"),
]


@pytest.mark.parametrize(("path", "expected"), MODEL_PATHS)
def test_model(path: str, expected: str) -> None:
    app, _ = app_on(FINE)
    response = fetch(app, path)
    assert (response.status, answered(response)["id"]) == (200, expected)


def test_model_that_does_not_exist() -> None:
    app, _ = app_on(FINE)
    response = fetch(app, "/v1/models/gpt-4o")
    assert (response.status, answered(response)["error"]["code"]) == (404, "model_not_found")
    response = fetch(app, "/v1/models/gpt-4o", anthropic_version="2023-06-01")
    assert (response.status, answered(response)["error"]["type"]) == (404, "not_found_error")


def test_catalogue_is_refreshed_after_an_hour_and_retried_after_a_minute() -> None:
    now = [0.0]
    catalogue = shim.Catalogue(lambda: now[0])
    seen = []
    for moment in (0.0, 59.9, 60.0, 61.0):
        now[0] = moment
        seen.append(catalogue.claim())
    catalogue.update(LIVE_LIST["data"])
    for moment in (3660.0, 3661.0):
        now[0] = moment
        seen.append(catalogue.claim())
    assert seen == [True, False, True, False, False, True]


# --- health


@pytest.mark.parametrize("path", ["/", "/v1", "/health", "/healthz", "/ping", "/version"])
def test_health_costs_nothing(path: str) -> None:
    app, upstream = app_on(FINE)
    response = fetch(app, path)
    assert (response.status, answered(response)) == (
        200,
        {"status": "ok", "service": "claude_shim", "version": shim.__version__},
    )
    assert upstream.requests == []


DEEP = [
    case("taken", in_json(200, LIVE_LIST), 200, "ok", {"credential": "ok"}),
    case(
        "refused",
        refused(401, "authentication_error", "invalid x-api-key"),
        503,
        "failed",
        {"credential": "refused", "reason": "invalid x-api-key"},
    ),
    case(
        "nobody there",
        shim.UpstreamUnreachableError("no route"),
        503,
        "failed",
        {"credential": "unknown", "reason": "no route"},
    ),
]


@pytest.mark.parametrize(("scripted", "status", "word", "told"), DEEP)
def test_deep_health_asks_upstream_once_a_minute(
    scripted: Any, status: int, word: str, told: JSON
) -> None:
    app, upstream = app_on(scripted)
    for _ in range(2):
        response = fetch(app, "/health?deep=1")
        expected = {"service": "claude_shim", "version": shim.__version__, "status": word, **told}
        assert (response.status, answered(response)) == (status, expected)
    assert [request.path for request in upstream.requests] == ["/v1/models?limit=1"]


def described(keyed: bool = False) -> JSON:
    """The description as it goes over the wire."""
    return json.loads(shim.dumps(shim.openapi_description(shim.ROUTES, keyed)))


def test_description_has_every_route_and_nothing_else() -> None:
    routes = (
        shim.Route(("POST",), "/v1/messages", "messages", "asks"),
        shim.Route(("GET", "HEAD"), "/v1/models/{id}", "model", "one model"),
        shim.Route(("GET", "DELETE"), "/v1/skills[/...]", "relay", "skills"),
    )
    paths = shim.openapi_description(routes, False)["paths"]
    assert {path: sorted(entry) for path, entry in paths.items()} == {
        "/v1/messages": ["post"],
        "/v1/models/{id}": ["get", "head", "parameters"],
        "/v1/skills": ["delete", "get"],
        "/v1/skills/{rest}": ["delete", "get", "parameters"],
    }
    assert paths["/v1/models/{id}"]["parameters"] == [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    assert paths["/v1/skills/{rest}"]["parameters"][0]["name"] == "rest"


def test_description_of_a_call_says_what_goes_in_and_what_comes_out() -> None:
    operation = described()["paths"]["/v1/chat/completions"]["post"]
    assert operation["summary"] == "OpenAI chat, streamed or not"
    assert operation["requestBody"]["required"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert (schema["type"], schema["required"]) == ("object", ["model", "messages"])
    assert sorted(operation["responses"]["200"]["content"]) == [
        "application/json",
        "text/event-stream",
    ]
    assert operation["responses"]["default"] == {"$ref": "#/components/responses/Error"}
    assert sorted(described()["components"]["schemas"]) == ["AnthropicError", "OpenAIError"]


def test_description_knows_the_body_of_every_post() -> None:
    posts = {route.endpoint for route in shim.ROUTES if "POST" in route.methods}
    assert posts - {"relay", "files"} <= set(shim.REQUEST_SCHEMAS)
    assert set(shim.REQUEST_SCHEMAS) <= {route.endpoint for route in shim.ROUTES}


def test_description_refers_to_nothing_that_is_missing() -> None:
    document = described()
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)))
    assert len(references) == 3
    for reference in references:
        found = document
        for name in reference.split("/"):
            found = found[name]
        assert found


def test_description_says_which_key_is_wanted_and_where_none_is() -> None:
    keyed, open_ = described(keyed=True), described()
    assert keyed["security"] == [{"Authorization": []}, {"x-api-key": []}, {"api-key": []}]
    assert open_["security"] == []
    assert keyed["paths"]["/health"]["get"]["security"] == []
    assert "security" not in keyed["paths"]["/v1/messages"]["post"]


def test_description_wants_the_client_key_like_what_it_describes() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS), client_keys=shim.ClientKeys({"ann": "s3cret"}))
    with pytest.raises(shim.AuthenticationError):
        app.admit("GET", "/openapi.json", {})
    assert app.admit("GET", "/openapi.json", {"x-api-key": "s3cret"}) == "ann"
    document = answered(app.respond(shim.Request("GET", "/openapi.json", {})))
    assert (document["openapi"], len(document["security"])) == ("3.1.0", 3)
    assert document["info"] == {"title": "claude_shim", "version": shim.__version__}


def test_errors_are_as_described() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    schemas = described()["components"]["schemas"]
    for path, name in (("/v1/chat/completions", "OpenAIError"), ("/v1/messages", "AnthropicError")):
        body = answered(ask(app, path, {}))
        assert set(schemas[name]["required"]) <= set(body) <= set(schemas[name]["properties"])
        error = schemas[name]["properties"]["error"]
        assert sorted(body["error"]) == sorted(error["required"])


def test_websocket_is_refused_so_that_codex_falls_back() -> None:
    app, _ = app_on(FINE)
    response = fetch(app, "/v1/responses", upgrade="websocket")
    assert response.status == 426
    assert answered(response)["error"]["type"] == "invalid_request_error"
    assert fetch(app, "/v1/responses").status == 404


# --- who pays

UNAUTHORIZED = refused(401, "authentication_error", "OAuth token has expired.")


def app_with(credential: shim.Credential, *answers: Any, **policy: Any) -> Any:
    """An App before a scripted upstream, with a credential."""
    app, upstream = app_on(*answers, **policy)
    app.credential = credential
    return app, upstream


def bearers(upstream: ScriptedUpstream) -> List[str]:
    """The credentials that the requests carried."""
    wanted = ("authorization", "x-api-key")
    return [value for r in upstream.requests for name, value in r.headers if name in wanted]


WAYS = [case("chat", CHAT, streamed(*TEXT_EVENTS)), case("messages, relayed", MESSAGES, FINE)]


@pytest.mark.parametrize(("path", "fine"), WAYS)
def test_refused_token_is_renewed_and_the_request_tried_once_more_s1_b5(
    path: str, fine: Answer
) -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 3600), LATER)
    app, upstream = app_with(shim.Renewed(source, world()), UNAUTHORIZED, fine)
    assert ask(app, path, QUESTION).status == 200
    assert bearers(upstream) == ["Bearer at-1", "Bearer at-2"]
    assert upstream.requests[0].body == upstream.requests[1].body
    assert upstream.sources[0].fate == "closed"


@pytest.mark.parametrize(("path", "fine"), WAYS)
def test_token_that_is_refused_twice_is_a_401(path: str, fine: Answer) -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 3600), LATER)
    app, upstream = app_with(shim.Renewed(source, world()), UNAUTHORIZED)
    response = ask(app, path, QUESTION)
    assert (response.status, len(upstream.requests)) == (401, 2)
    assert "OAuth token has expired." in answered(response)["error"]["message"]


class Ended(shim.AuthToken):
    """A token that upstream refuses, and that nobody renews."""

    def authorization(
        self, client: Dict[str, str], rejected: Optional[shim.HeaderList] = None
    ) -> shim.HeaderList:
        if rejected is not None:
            raise shim.CredentialError("log in again")
        return super().authorization(client)


def test_refused_token_that_cannot_be_renewed_lets_go_of_the_connection() -> None:
    upstream = ScriptedUpstream(refused(401, "authentication_error", "expired"))
    app = shim.App(upstream, Ended("token-1", "the test"), shim.Policy(live_models=False))
    error = ask(app, MESSAGES, QUESTION)
    assert (error.status, answered(error)["error"]["message"]) == (401, "log in again")
    assert [source.fate for source in upstream.sources] == ["dropped"]


def test_refused_api_key_is_not_tried_again() -> None:
    app, upstream = app_on(UNAUTHORIZED)
    assert ask(app, MESSAGES, QUESTION).status == 401
    assert len(upstream.requests) == 1


class RefusesFirst(shim.Upstream):
    """Refuses one token, takes all others; safe for many threads."""

    def __init__(self, together: int) -> None:
        self.barrier = threading.Barrier(together)
        self.seen: List[str] = []

    def send(self, request: shim.UpstreamRequest) -> shim.UpstreamResponse:
        token = dict(request.headers)["authorization"]
        self.seen.append(token)
        if token == "Bearer at-1":
            self.barrier.wait(2 * PATIENCE)  # all are refused before anybody is helped
            return shim.UpstreamResponse(401, [], shim.BytesSource(b"{}"))
        return shim.UpstreamResponse(200, [], shim.BytesSource(b"{}"))


def test_storm_of_401_is_one_renewal_and_one_more_try_each() -> None:
    source = Rotating(shim.Bundle("at-1", "rt-1", NOW + 3600), LATER)
    upstream = RefusesFirst(100)
    policy = shim.Policy(live_models=False)
    app = shim.App(upstream, shim.Renewed(source, world()), policy)
    statuses = in_parallel(100, lambda _: ask(app, MESSAGES, QUESTION).status)
    assert statuses == [200] * 100
    assert source.asked == ["at-1"]
    assert sorted(upstream.seen) == ["Bearer at-1"] * 100 + ["Bearer at-2"] * 100


def test_void_login_tells_the_client_what_its_owner_has_to_do() -> None:
    void = shim.CredentialError("the login is void: run `claude_shim login`")
    source = Rotating(shim.Bundle("at-1", "rt-1", 0.0), void)
    app, upstream = app_with(shim.Renewed(source, world()), FINE)
    response = ask(app, MESSAGES, QUESTION)
    assert (response.status, upstream.requests) == (401, [])
    assert answered(response)["error"] == {
        "type": "authentication_error",
        "message": "the login is void: run `claude_shim login`",
    }


def test_login_that_cannot_be_renewed_now_is_a_503_to_try_again() -> None:
    down = shim.CredentialUnavailableError("h.example is down", 20.0)
    source = Rotating(shim.Bundle("at-1", "rt-1", 0.0), down)
    for path in (MESSAGES, CHAT):
        app, upstream = app_with(shim.Renewed(source, world()), FINE)
        response = ask(app, path, QUESTION)
        assert (response.status, field(response, "retry-after")) == (503, ["20"])
        assert upstream.requests == []


BROKE = [
    case("it is refused", refused(401, "authentication_error", "no")),
    case("it has no credit", refused(402, "billing_error", "no")),
    case("it may not", refused(403, "permission_error", "no")),
    case("it is used up", refused(429, "rate_limit_error", "no")),
    case(
        "it is empty",
        refused(400, "invalid_request_error", "Your credit balance is too low to access the API."),
    ),
]


def test_request_that_is_wrong_is_not_paid_for_twice() -> None:
    second = shim.APIKey("sk-ant-api03-second", "the test")
    for path in (MESSAGES, CHAT):
        app, upstream = app_on(refused(400, "invalid_request_error", "odd"), fallback=second)
        response = ask(app, path, QUESTION)
        assert (response.status, answered(response)["error"]["message"]) == (400, "odd")
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("broke", BROKE)
@pytest.mark.parametrize(("path", "fine"), WAYS)
def test_fallback_pays_when_the_first_does_not_and_the_answer_says_so(
    path: str, fine: Answer, broke: Answer
) -> None:
    second = shim.APIKey("sk-ant-api03-second", "the test")
    app, upstream = app_on(broke, fine, fallback=second)
    response = ask(app, path, QUESTION)
    assert (response.status, field(response, "x-claude-shim-billing")) == (200, ["api-key"])
    assert bearers(upstream) == ["sk-ant-api03-upstream", "sk-ant-api03-second"]


@pytest.mark.parametrize(("path", "fine"), WAYS)
def test_fallback_pays_when_the_first_cannot_be_renewed(path: str, fine: Answer) -> None:
    void = shim.CredentialError("void")
    source = Rotating(shim.Bundle("at-1", "rt-1", 0.0), void)
    second = shim.APIKey("sk-ant-api03-second", "the test")
    app, upstream = app_with(shim.Renewed(source, world()), fine, fallback=second)
    response = ask(app, path, QUESTION)
    assert field(response, "x-claude-shim-billing") == ["api-key"]
    assert bearers(upstream) == ["sk-ant-api03-second"]


@pytest.mark.parametrize(("path", "fine"), WAYS)
def test_fallback_that_is_not_needed_pays_nothing(path: str, fine: Answer) -> None:
    second = shim.APIKey("sk-ant-api03-second", "the test")
    app, upstream = app_on(fine, fallback=second)
    assert field(ask(app, path, QUESTION), "x-claude-shim-billing") == []
    assert bearers(upstream) == ["sk-ant-api03-upstream"]


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1)])
def test_fallback_that_pays_for_some_of_several_choices_is_told_once(broken: Tuple[int]) -> None:
    second = shim.APIKey("sk-ant-api03-second", "the test")
    fine, broke = streamed(*TEXT_EVENTS), refused(429, "rate_limit_error", "no")
    answers = [each for n in range(2) for each in ([broke, fine] if n in broken else [fine])]
    app, _ = app_on(*answers, fallback=second)
    response = ask(app, CHAT, {**QUESTION, "n": 2})
    assert field(response, "x-claude-shim-billing") == ["api-key"]


def test_without_a_fallback_nobody_else_pays() -> None:
    """S1-B4."""
    app, upstream = app_on(refused(429, "rate_limit_error", "no"))
    assert ask(app, MESSAGES, QUESTION).status == 429
    assert len(upstream.requests) == 1


# ----------------------------------------------------------------------
# 13. HTTP server
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        case(
            "HTTP/1.1",
            b"GET /v1/models?x=1 HTTP/1.1\r\nHost: localhost\r\nX-A: \t b \r\nx-a:c",
            ("GET", "/v1/models?x=1", 1, {"host": ["localhost"], "x-a": ["b", "c"]}),
        ),
        case("HTTP/1.0 without Host", b"GET / HTTP/1.0", ("GET", "/", 0, {})),
        case(
            "the whole server",
            b"OPTIONS * HTTP/1.1\r\nHost: a",
            ("OPTIONS", "*", 1, {"host": ["a"]}),
        ),
        case(
            "an absolute target, which replaces Host",
            b"GET http://b.example:80/c?d HTTP/1.1\r\nHost: a\r\nX: 1",
            ("GET", "/c?d", 1, {"host": ["b.example:80"], "x": ["1"]}),
        ),
        case(
            "an absolute target without path",
            b"GET HTTP://b HTTP/1.1\r\nHost: a",
            ("GET", "/", 1, {"host": ["b"]}),
        ),
        case(
            "bytes beyond ASCII in a value",
            b"GET / HTTP/1.0\r\nX: caf\xe9",
            ("GET", "/", 0, {"x": ["caf\xe9"]}),
        ),
    ],
)
def test_request_head_is_parsed(head: bytes, expected: Any) -> None:
    assert shim.parsed_head(head) == expected


def test_request_head_with_a_field_twice_takes_no_quadratic_time() -> None:
    lines = b"".join(b"\r\nx%d: 1" % number for number in range(15_000))
    began = time.process_time()
    head = shim.parsed_head(b"GET / HTTP/1.1\r\nHost: a" + lines + b"\r\nx1: 2")
    assert time.process_time() - began < 2.0  # it once took 4
    assert (len(head.fields), head.fields["x1"]) == (15_001, ["1", "2"])


def test_request_head_that_comes_byte_by_byte_takes_no_quadratic_time() -> None:
    reader = shim.RequestReader(shim.ServerLimits())
    fields = [b"a%d: %b\r\n" % (number, b"x" * 500) for number in range(120)]
    began = time.process_time()
    for byte in single_bytes(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n" + b"".join(fields) + b"\r"):
        reader.feed(byte)
        assert reader.head() is None
    assert time.process_time() - began < 3.0  # it once took 8
    reader.feed(b"\nnext")
    head = reader.head()
    assert head is not None
    assert (head.target, len(head.fields), len(reader)) == ("/", 121, 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        case("nothing", "", (False, 0, True)),
        case("a length", "Content-Length: 5", (False, 5, True)),
        case("the largest length", "Content-Length: 100", (False, 100, True)),
        case("the same length twice", "Content-Length: 5\r\ncontent-length: 5", (False, 5, True)),
        case("chunked", "Transfer-Encoding: Chunked", (True, None, True)),
        case("no encoding", "Content-Encoding: identity\r\nContent-Length: 1", (False, 1, True)),
        case("gzip", "Content-Encoding: GZip\r\nContent-Length: 1", (False, 1, True)),
        case("deflate", "Content-Encoding: deflate\r\nContent-Length: 1", (False, 1, True)),
    ],
)
def test_request_framing(fields: str, expected: Any) -> None:
    head = shim.parsed_head(f"POST / HTTP/1.1\r\nHost: a\r\n{fields or 'X: 1'}".encode())
    assert shim.request_framing(head, 100) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        case("none", [], ""),
        case("an empty one", ["", " , "], ""),
        case("no coding", ["identity"], ""),
        case("gzip", ["gzip"], "gzip"),
        case("gzip by its old name", ["X-GZip"], "x-gzip"),
        case("deflate", ["identity, Deflate"], "deflate"),
        *[
            case(f"{value!r}", [value], None)
            for value in ("br", "zstd", "compress", "gzip, gzip", "deflate, gzip", "gzip;q=1", "*")
        ],
        case("two fields", ["gzip", "gzip"], None),
    ],
)
def test_coding_of_a_body(fields: List[str], expected: Optional[str]) -> None:
    head = shim.Head("POST", "/", 1, {"content-encoding": fields} if fields else {})
    if expected is not None:
        assert shim.content_coding(head) == expected
        return
    with pytest.raises(shim.UnsupportedEncodingError) as caught:
        shim.request_framing(head, 100)
    assert (caught.value.status, caught.value.headers) == (
        415,
        [("accept-encoding", "gzip, deflate")],
    )


GZIPPED_HELLO = bytes.fromhex("1f8b0800000000000203cb48cdc9c9070086a6103605000000")
DEFLATED_HELLO = bytes.fromhex("789ccb48cdc9c90700062c0215")
GZIPPED_NOTHING = bytes.fromhex("1f8b080000000000020303000000000000000000")


@pytest.mark.parametrize(
    ("body", "coding", "expected"),
    [
        case("gzip", GZIPPED_HELLO, "gzip", b"hello"),
        case("gzip by its old name", GZIPPED_HELLO, "x-gzip", b"hello"),
        case("deflate", DEFLATED_HELLO, "deflate", b"hello"),
        case("no coding", GZIPPED_HELLO, "", GZIPPED_HELLO),
        case("no body", b"", "gzip", b""),
        case("nothing in gzip", GZIPPED_NOTHING, "gzip", b""),
        case("as much as allowed", zlib.compress(bytes(1000)), "deflate", bytes(1000)),
    ],
)
def test_decompressed_body(body: bytes, coding: str, expected: bytes) -> None:
    assert shim.decompressed(body, coding, 1000) == expected


@pytest.mark.parametrize(
    ("body", "coding", "status", "sentence"),
    [
        case("a second member", GZIPPED_HELLO * 2, "gzip", 400, "is not one whole gzip stream"),
        case("bytes after it", GZIPPED_HELLO + b"\0", "gzip", 400, "is not one whole gzip stream"),
        case("deflate and more", DEFLATED_HELLO + b"{", "deflate", 400, "is not one whole deflate"),
        *[
            case(f"the first {end} bytes", GZIPPED_HELLO[:end], "gzip", 400, "is not one whole")
            for end in (1, 10, 15, 24)
        ],
        case("a wrong checksum", GZIPPED_HELLO[:-8] + bytes(8), "gzip", 400, "is not gzip"),
        case("deflate for gzip", DEFLATED_HELLO, "gzip", 400, "is not gzip, as its header says"),
        case("gzip for deflate", GZIPPED_HELLO, "deflate", 400, "is not deflate"),
        case("deflate without its head", DEFLATED_HELLO[2:-4], "deflate", 400, "is not deflate"),
        case("no coding at all", b"{}", "gzip", 400, "is not gzip"),
        case("a byte too much", zlib.compress(bytes(1001)), "deflate", 413, "is over 1000 bytes"),
        case("a bomb", zlib.compress(bytes(50 << 20)), "deflate", 413, "is over 1000 bytes"),
        case("a cut bomb", zlib.compress(bytes(9999))[:-4], "deflate", 413, "is over 1000 bytes"),
    ],
)
def test_compressed_body_that_is_refused(
    body: bytes, coding: str, status: int, sentence: str
) -> None:
    with pytest.raises(shim.ProtocolError, match=f"^the request body {sentence}") as caught:
        shim.decompressed(body, coding, 1000)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("start", "told"),
    [
        case(
            "TLS", b"\x16\x03\x01\x02", (400, "this port speaks plain HTTP, not TLS: use http://")
        ),
        case(
            "older TLS", b"\x16\x03\x00", (400, "this port speaks plain HTTP, not TLS: use http://")
        ),
        case(
            "HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            (505, "this port speaks HTTP/1.1 only: turn off HTTP/2 with prior knowledge"),
        ),
        case("HTTP/1.1", b"PRI * HTTP/1.1\r\n", None),
        case("a part of it", b"PRI * HTTP/2.", None),
        case("nothing", b"", None),
    ],
)
def test_other_protocol_is_named(start: bytes, told: Optional[Tuple[int, str]]) -> None:
    if told is None:
        shim.check_protocol(start)
        return
    with pytest.raises(shim.ProtocolError) as caught:
        shim.check_protocol(start)
    assert (caught.value.status, caught.value.message) == told


@pytest.mark.parametrize(
    ("authority", "expected"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8765", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::1]:80", "::1"),
        ("my-host.example:65535", "my-host.example"),
        ("", ""),
        ("::1", ""),
        ("[::1", ""),
        ("localhost:", ""),
        ("localhost:port", ""),
        ("localhost:123456", ""),
        ("localhost:80:80", ""),
        ("localhost@evil.example", ""),
        ("localhost/evil", ""),
    ],
)
def test_host_name(authority: str, expected: str) -> None:
    assert shim.host_name(authority) == expected


LOOPBACK = "localhost:8765"


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        case("localhost", {"host": "localhost"}, True),
        case("localhost at any port", {"host": "LOCALHOST:3000"}, True),
        case("127.0.0.1", {"host": "127.0.0.1:8765"}, True),
        case("IPv6", {"host": "[::1]:8765"}, True),
        case("an allowed name", {"host": "My.Example:1"}, True),
        case("a foreign name (DNS rebinding)", {"host": "evil.example"}, False),
        case("a name that begins like ours", {"host": "localhost.evil.example"}, False),
        case("an address that begins like ours", {"host": "127.0.0.1.evil.example"}, False),
        case("a name that ends like ours", {"host": "evil-my.example"}, False),
        case("a name below ours", {"host": "x.my.example"}, False),
        case("any address", {"host": "0.0.0.0"}, False),
        case("a user before the host", {"host": "localhost@evil.example"}, False),
        case("two names", {"host": "localhost, evil.example"}, False),
        case("a page of ours", {"host": LOOPBACK, "origin": "http://localhost:3000"}, True),
        case("a page at IPv6", {"host": LOOPBACK, "origin": "http://[::1]:3000"}, True),
        case("a page of an allowed name", {"host": LOOPBACK, "origin": "https://my.example"}, True),
        case("a foreign page", {"host": LOOPBACK, "origin": "https://evil.example"}, False),
        case(
            "a page that begins like ours",
            {"host": LOOPBACK, "origin": "http://localhost.e"},
            False,
        ),
        case("a page without origin", {"host": LOOPBACK, "origin": "null"}, False),
        case("an empty origin", {"host": LOOPBACK, "origin": ""}, False),
        case("an extension", {"host": LOOPBACK, "origin": "chrome-extension://abcdef"}, False),
        case("the address bar", {"host": LOOPBACK, "sec-fetch-site": "none"}, True),
        case("the same origin", {"host": LOOPBACK, "sec-fetch-site": "same-origin"}, True),
        case("another site", {"host": LOOPBACK, "sec-fetch-site": "cross-site"}, False),
        case("the same site", {"host": LOOPBACK, "sec-fetch-site": "same-site"}, False),
        case("an allowed page", {"host": LOOPBACK, "origin": "https://app.example:8443"}, True),
        case(
            "an allowed page, as browsers say it",
            {
                "host": LOOPBACK,
                "origin": "https://app.example:8443",
                "sec-fetch-site": "cross-site",
            },
            True,
        ),
        case("an allowed page at another port", {"origin": "https://app.example"}, False),
        case("an allowed page without TLS", {"origin": "http://app.example:8443"}, False),
        case("an allowed page in capitals", {"origin": "https://APP.example:8443"}, False),
        case("an allowed page, and more", {"origin": "https://app.example:8443.e.example"}, False),
        case(
            "an allowed page for a foreign name",
            {"host": "evil.example", "origin": "https://app.example:8443"},
            False,
        ),
        case(
            "no word of an allowed page", {"host": LOOPBACK, "sec-fetch-site": "cross-site"}, False
        ),
        case(
            "a proxy's word in the standard's form",
            {"host": "evil.example", "forwarded": "host=localhost"},
            False,
        ),
        case(
            "a proxy's word, which counts for nothing",
            {"host": "evil.example", "x-forwarded-host": "localhost"},
            False,
        ),
    ],
)
def test_origin_of_a_request_s2_b6(fields: Dict[str, str], allowed: bool) -> None:
    head = shim.Head("GET", "/v1/messages", 1, {k: [v] for k, v in fields.items()})
    names, origins = frozenset({"127.0.0.1", "my.example"}), frozenset({"https://app.example:8443"})
    if allowed:
        shim.check_origin(head, names, origins)
    else:
        with pytest.raises(shim.ForbiddenError):
            shim.check_origin(head, names, origins)


def test_one_allowed_origin_of_two_is_not_enough() -> None:
    fields = {"host": [LOOPBACK], "origin": ["https://app.example", "https://evil.example"]}
    with pytest.raises(shim.ForbiddenError):
        shim.check_origin(
            shim.Head("GET", "/", 1, fields), frozenset(), frozenset({"https://app.example"})
        )


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://app.example"])
@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        case("JSON", {"content-type": "application/json"}, True),
        case("JSON with a charset", {"content-type": "Application/JSON; charset=utf-8"}, True),
        case("a field that no form can send", {"anthropic-version": "2023-06-01"}, True),
        case("no type", {}, False),
        case("plain text", {"content-type": "text/plain"}, False),
        case("JSON as plain text", {"content-type": "text/plain; application/json"}, False),
        case("a form", {"content-type": "application/x-www-form-urlencoded"}, False),
        case("a form with files", {"content-type": "multipart/form-data; boundary=x"}, False),
        case("a longer word", {"content-type": "application/jsonx"}, False),
    ],
)
def test_form_of_a_page_is_refused(fields: Dict[str, str], allowed: bool, origin: str) -> None:
    given = {"host": LOOPBACK, "origin": origin, **fields}
    head = shim.Head("POST", "/v1/messages", 1, {k: [v] for k, v in given.items()})
    if allowed:
        shim.check_origin(head, frozenset(), frozenset({"https://app.example"}))
    else:
        with pytest.raises(shim.UnsupportedTypeError):
            shim.check_origin(head, frozenset(), frozenset({"https://app.example"}))


def test_program_may_send_any_type() -> None:
    fields = {"host": [LOOPBACK], "content-type": ["application/x-www-form-urlencoded"]}
    shim.check_origin(shim.Head("POST", "/v1/messages", 1, fields), frozenset())


READ_BY_PAGES = (
    "request-id, x-request-id, x-claude-shim-ignored, x-claude-shim-estimate, "
    "retry-after, retry-after-ms, x-should-retry, "
    "x-ratelimit-limit-requests, x-ratelimit-limit-tokens, "
    "x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, "
    "x-ratelimit-reset-requests, x-ratelimit-reset-tokens, "
    "anthropic-ratelimit-requests-limit, anthropic-ratelimit-requests-remaining, "
    "anthropic-ratelimit-requests-reset, "
    "anthropic-ratelimit-tokens-limit, anthropic-ratelimit-tokens-remaining, "
    "anthropic-ratelimit-tokens-reset, "
    "anthropic-ratelimit-input-tokens-limit, anthropic-ratelimit-input-tokens-remaining, "
    "anthropic-ratelimit-input-tokens-reset, "
    "anthropic-ratelimit-output-tokens-limit, anthropic-ratelimit-output-tokens-remaining, "
    "anthropic-ratelimit-output-tokens-reset"
)
APP_ORIGIN = "https://app.example"


@pytest.mark.parametrize(
    ("line", "origin", "asked", "expected"),
    [
        case("a program", "POST /v1/messages", None, "", {}),
        case("a foreign page", "POST /v1/messages", "https://evil.example", "", {}),
        case("a preflight of a foreign page", "OPTIONS /", "https://evil.example", "accept", {}),
        case("no origin", "GET /", "null", "", {}),
        case(
            "an allowed page",
            "POST /v1/messages",
            APP_ORIGIN,
            "",
            {"allow-origin": APP_ORIGIN, "expose-headers": READ_BY_PAGES},
        ),
        case(
            "a preflight as the SDKs cause it",
            "OPTIONS /v1/models?limit=1",
            APP_ORIGIN,
            "authorization, Content-Type,x-stainless-retry-count, anthropic-version",
            {
                "allow-origin": APP_ORIGIN,
                "allow-methods": "GET, HEAD",
                "allow-headers": (
                    "authorization, content-type, x-stainless-retry-count, anthropic-version"
                ),
                "max-age": "600",
            },
        ),
        case(
            "a preflight that asks for more than there is",
            "OPTIONS /v1/messages",
            APP_ORIGIN,
            "x-api-key, cookie, x-<script>, anthropic-<b>, *, x-forwarded-for",
            {
                "allow-origin": APP_ORIGIN,
                "allow-methods": "POST",
                "allow-headers": "x-api-key",
                "max-age": "600",
            },
        ),
        case(
            "a preflight for what does not exist",
            "OPTIONS /unknown",
            APP_ORIGIN,
            "",
            {
                "allow-origin": APP_ORIGIN,
                "allow-methods": "",
                "allow-headers": "",
                "max-age": "600",
            },
        ),
    ],
)
def test_page_is_told_what_it_may(
    line: str, origin: Optional[str], asked: str, expected: Dict[str, str]
) -> None:
    method, target = line.split(" ")
    fields = {"origin": [origin]} if origin else {}
    head = shim.Head(method, target, 1, {**fields, "access-control-request-headers": [asked]})
    assert shim.cross_origin_headers(head, frozenset()) == []
    told = shim.cross_origin_headers(head, frozenset({APP_ORIGIN, "https://other.example"}))
    assert dict(told) == {
        "vary": "Origin",
        **{f"access-control-{name}": value for name, value in expected.items()},
    }


def test_page_of_an_allowed_origin_reads_every_answer() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS), allowed_origins=frozenset({APP_ORIGIN}))
    page = (f"Origin: {APP_ORIGIN}", "Sec-Fetch-Site: cross-site", "Content-Type: application/json")
    with shim.Server(app) as server, RawClient(server) as client:
        for raw, status in (
            (raw_post("/v1/messages", ASKED, *page), 200),
            (raw_post("/v1/chat/completions", {**ASKED, "stream": True}, *page), 200),
            (raw_post("/v1/chat/completions", ASKED, *page), 200),
            (raw_post("/v1/chat/completions", {}, *page), 400),
            (raw_request("GET /unknown HTTP/1.1", *page), 404),
            (raw_request("OPTIONS /v1/messages HTTP/1.1", *page), 204),
        ):
            answer = client.send(raw).answer()
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (
                status,
                APP_ORIGIN,
            )
            assert answer.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in answer.headers


def test_refused_host_is_told_what_to_do() -> None:
    head = shim.Head("GET", "/", 1, {"host": ["my.example:80"]})
    with pytest.raises(shim.ForbiddenError, match=r"--allow-host my\.example$"):
        shim.check_origin(head, frozenset())


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        case("a known status", 404, [("a", "b")], (b"HTTP/1.1 404 Not Found", b"a: b\r\n")),
        case("an unknown status", 529, [("a", "")], (b"HTTP/1.1 529 Unknown", b"a: \r\n")),
        case(
            "control characters become spaces",
            200,
            [("a", "b\r\nEvil: 1\x00\x7f\tc")],
            (b"HTTP/1.1 200 OK", b"a: b  Evil: 1  \tc\r\n"),
        ),
        case(
            "characters beyond Latin-1 become question marks",
            200,
            [("a", "\u4e16\xe9")],
            (b"HTTP/1.1 200 OK", b"a: ?\xe9\r\n"),
        ),
    ],
)
def test_response_head_as_clients_get_it(status: int, headers: Any, expected: Any) -> None:
    first, own = expected
    assert shim.response_head(status, headers, 784111777) == (
        first + b"\r\ndate: Sun, 06 Nov 1994 08:49:37 GMT\r\nx-content-type-options: nosniff\r\n"
        b"cache-control: no-store\r\n"
        b"content-security-policy: default-src 'none'; frame-ancestors 'none'\r\n"
        b"cross-origin-resource-policy: same-origin\r\n" + own + b"\r\n"
    )


class RawAnswer(NamedTuple):
    """One answer as a client reads it."""

    status: int
    headers: Dict[str, str]
    body: bytes


class RawClient:
    """One connection to a server; it sees every byte."""

    def __init__(self, server: shim.Server) -> None:
        self.sock = socket.create_connection(server.server_address[:2], PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.sock.close()

    def send(self, raw: bytes) -> RawClient:
        self.sock.sendall(raw)
        return self

    def until(self, mark: bytes) -> bytes:
        """The bytes up to and with `mark`."""
        while mark not in self._buffer:
            self._fill()
        end = self._buffer.index(mark) + len(mark)
        taken, self._buffer = self._buffer[:end], self._buffer[end:]
        return taken

    def exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._fill()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def rest(self) -> bytes:
        """All bytes until the server closes; ConnectionResetError if it does so rudely."""
        while True:
            burst = self.sock.recv(1 << 16)
            self._buffer += burst
            if not burst:
                taken, self._buffer = self._buffer, b""
                return taken

    def answer(self, to: str = "POST") -> RawAnswer:
        """One answer, whose body must be whole."""
        head = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        fields = dict(line.split(": ", 1) for line in head[1:-2])
        status = int(head[0].split(" ")[1])
        body = b""
        if fields.get("transfer-encoding") == "chunked":
            body = unchunked(self.until(LAST_CHUNK))
        elif to != "HEAD":
            body = self.exactly(int(fields.get("content-length", "0")))
        return RawAnswer(status, fields, body)

    def _fill(self) -> None:
        burst = self.sock.recv(1 << 16)
        assert burst, f"closed after {self._buffer!r}"
        self._buffer += burst


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells of."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"


def unchunked(raw: bytes) -> bytes:
    """The data of all chunks that are there, also of the last one if it is cut."""
    pieces, position = [], 0
    while position < len(raw):
        start = raw.index(b"\r\n", position) + 2
        position = start + int(raw[position : start - 2], 16)
        pieces.append(raw[start:position])
        position += 2
    return b"".join(pieces)


def raw_request(line: str, *fields: str, body: bytes = b"", host: str = "Host: localhost") -> bytes:
    """A request to the byte."""
    lines = [line, *([host] if host else []), *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def raw_post(path: str, body: Any, *fields: str) -> bytes:
    """A POST whose body is well framed."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = f"Content-Length: {len(content)}"
    return raw_request(f"POST {path} HTTP/1.1", *fields, length, body=content)


ASKED: JSON = {
    "model": "claude-opus-5-5",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
}
ASKED_BYTES = json.dumps(ASKED).encode()
GZIPPED_ASKED = gzip.compress(ASKED_BYTES)
HEALTH = raw_request("GET /health HTTP/1.1")
POST_MESSAGES = raw_post("/v1/messages", ASKED)
POST_CHAT = raw_post("/v1/chat/completions", {**ASKED, "stream": True})
POST_CHAT_AT_ONCE = raw_post("/v1/chat/completions", ASKED)


class DrippingSocket(socket.socket):
    """Receives one byte at a time."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(min(size, 1), flags)


class DrippingServer(shim.Server):
    """A server whose clients' bytes come one at a time."""

    def get_request(self) -> Any:
        sock, address = super().get_request()
        return DrippingSocket(sock.family, sock.type, sock.proto, sock.detach()), address


Served = Tuple[shim.Server, ScriptedUpstream]


@pytest.fixture(scope="module", params=["in one piece", "byte by byte"])
def served(request: Any) -> Iterator[Served]:
    """A server on a scripted upstream; small requests come whole or one byte at a time."""
    app, upstream = app_on(streamed(*TEXT_EVENTS))
    kind = shim.Server if request.param == "in one piece" else DrippingServer
    limits = shim.ServerLimits(max_body=10_000, max_line=1_000, max_workers=1)
    with kind(app, limits=limits) as server, RawClient(server) as client:
        client.send(POST_MESSAGES).answer()  # begins the worker, which stays
        yield server, upstream


def chunked_post(coded: bytes, *fields: str, path: str = "/v1/messages") -> bytes:
    """A POST whose chunks are given as they go over the wire."""
    return raw_request(f"POST {path} HTTP/1.1", "Transfer-Encoding: chunked", *fields, body=coded)


@pytest.mark.parametrize(
    "raw",
    [
        case("a length", POST_MESSAGES),
        case(
            "a length told twice",
            raw_post("/v1/messages", ASKED, f"Content-Length: {len(ASKED_BYTES)}"),
        ),
        case("one chunk", chunked_post(in_chunks(ASKED_BYTES) + LAST_CHUNK)),
        case(
            "a chunk a byte",
            chunked_post(in_chunks(*[bytes([b]) for b in ASKED_BYTES]) + LAST_CHUNK),
        ),
        case(
            "a size in capitals and with zeros before it",
            chunked_post(b"0000%X\r\n%b\r\n" % (len(ASKED_BYTES), ASKED_BYTES) + b"000\r\n\r\n"),
        ),
        case(
            "chunk extensions",
            chunked_post(
                b'%x ;a=b;c="d e"\r\n%b\r\n0;last\r\n\r\n' % (len(ASKED_BYTES), ASKED_BYTES)
            ),
        ),
        case(
            "trailers, which do not become header fields",
            chunked_post(in_chunks(ASKED_BYTES) + b"0\r\nX-A: 1\r\nContent-Type: b\r\n\r\n"),
        ),
        case(
            "chunked in other letters",
            raw_request(
                "POST /v1/messages HTTP/1.1",
                "TRANSFER-ENCODING: ChunkeD",
                body=in_chunks(ASKED_BYTES) + LAST_CHUNK,
            ),
        ),
        case("gzip", raw_post("/v1/messages", GZIPPED_ASKED, "Content-Encoding: gzip")),
        case(
            "deflate in chunks",
            chunked_post(
                in_chunks(*map(bytes, zip(zlib.compress(ASKED_BYTES)))) + LAST_CHUNK,
                "Content-Encoding: deflate",
            ),
        ),
        case("an empty line before the request", b"\r\n" + POST_MESSAGES),
        case("blanks around values", raw_post("/v1/messages", ASKED, "X-A: \t b \t")),
        case("an absolute target", raw_post("http://localhost:1/v1/messages", ASKED)),
        case(
            "a version that asks to upgrade", raw_post("/v1/messages", ASKED, "Upgrade: websocket")
        ),
        case("128 header fields", raw_post("/v1/messages", ASKED, *["X: 1"] * 126)),
        case("a line as long as allowed", raw_post("/v1/messages?" + "a" * 973, ASKED)),
        case("a field as long as allowed", raw_post("/v1/messages", ASKED, "X: " + "a" * 997)),
        case(
            "a page of this machine",
            raw_post(
                *("/v1/messages", ASKED),
                *("Origin: http://localhost:1", "Content-Type: application/json"),
            ),
        ),
    ],
)
def test_request_is_read_exactly_and_so_is_the_next(raw: bytes, served: Served) -> None:
    server, upstream = served
    before = len(upstream.requests)
    with RawClient(server) as client:
        first, second = client.send(raw + HEALTH).answer(), client.answer()
    assert (first.status, first.body) == (200, sse(*TEXT_EVENTS))
    assert (second.status, json.loads(second.body)["status"]) == (200, "ok")
    assert [request.body for request in upstream.requests[before:]] == [ASKED_BYTES]


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    server, _ = served
    unknown = raw_request("GET /unknown HTTP/1.1")
    with RawClient(server) as client:
        client.send(POST_MESSAGES + unknown + HEALTH + POST_MESSAGES + HEALTH)
        assert [client.answer().status for _ in range(5)] == [200, 404, 200, 200, 200]


def test_request_that_ends_early_is_not_asked_of_upstream(served: Served) -> None:
    server, upstream = served
    before = len(upstream.requests)
    for raw in (
        POST_MESSAGES[:-1],
        POST_MESSAGES[:30],
        chunked_post(in_chunks(ASKED_BYTES) + b"0\r\n"),
    ):
        with RawClient(server) as client:
            client.send(raw).sock.shutdown(socket.SHUT_WR)
            assert client.rest() == b""
    assert upstream.requests[before:] == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        # the request line
        case("two empty lines before the request", b"\r\n\r\n" + HEALTH, 400),
        case("a bare LF after the request line", b"GET / HTTP/1.1\nHost: localhost\r\n\r\n", 400),
        case("bare LFs everywhere", b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
        case("two spaces", raw_request("GET  / HTTP/1.1"), 400),
        case("a tab for a space", raw_request("GET\t/ HTTP/1.1"), 400),
        case("a space at the end", raw_request("GET / HTTP/1.1 "), 400),
        case("a space at the start", raw_request(" GET / HTTP/1.1"), 400),
        case("a space in the target", raw_request("GET /a b HTTP/1.1"), 400),
        case("no target", raw_request("GET HTTP/1.1"), 400),
        case("no version, HTTP/0.9", b"GET /\r\n\r\n", 400),
        case("a version in lower case", raw_request("GET / http/1.1"), 400),
        case("a signed version", raw_request("GET / HTTP/+1.1"), 400),
        case("a byte beyond ASCII in the target", raw_request("GET /\xe9 HTTP/1.1"), 400),
        case("a NUL in the target", raw_request("GET /\x00 HTTP/1.1"), 400),
        case("a method with a brace", raw_request("G{T / HTTP/1.1"), 400),
        case("a relative target", raw_request("GET health HTTP/1.1"), 400),
        case("a host for a target", raw_request("CONNECT localhost:443 HTTP/1.1"), 400),
        case("a star for a target", raw_request("GET * HTTP/1.1"), 400),
        case(
            "an absolute target with a user", raw_request("GET http://a@localhost/ HTTP/1.1"), 400
        ),
        case("HTTP/1.2", raw_request("GET / HTTP/1.2"), 505),
        case("HTTP/2.0", raw_request("GET / HTTP/2.0"), 505),
        case("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        case("a line over the limit", raw_request("GET /" + "a" * 990 + " HTTP/1.1"), 414),
        case("an endless line", b"GET /" + b"a" * 2_000, 414),
        # header fields
        case("a bare LF after a field", b"GET / HTTP/1.1\r\nHost: localhost\nX: 1\r\n\r\n", 400),
        case("a bare CR in a value", raw_request("GET / HTTP/1.1", "X: a\rEvil: 1"), 400),
        case("two CRs at a line's end", raw_request("GET / HTTP/1.1", "X: a\r"), 400),
        case("a folded field", raw_request("GET / HTTP/1.1", "X: a\r\n b"), 400),
        case("a fold before the first field", raw_request("GET / HTTP/1.1", host=" X: 1"), 400),
        case("a space before the colon", raw_request("GET / HTTP/1.1", "X : 1"), 400),
        case(
            "a space before the colon of the length",
            raw_request("POST /v1/messages HTTP/1.1", "Content-Length : 5", body=b"12345"),
            400,
        ),
        case("no colon", raw_request("GET / HTTP/1.1", "garbage"), 400),
        case("no name", raw_request("GET / HTTP/1.1", ": 1"), 400),
        case("a bracket in a name", raw_request("GET / HTTP/1.1", "X[]: 1"), 400),
        case("a NUL in a value", raw_request("GET / HTTP/1.1", "X: a\x00b"), 400),
        case("a NUL in a name", raw_request("GET / HTTP/1.1", "X\x00: 1"), 400),
        case("a vertical tab in a value", raw_request("GET / HTTP/1.1", "X: a\x0bb"), 400),
        case("a DEL in a value", raw_request("GET / HTTP/1.1", "X: \x7f"), 400),
        case("129 fields", raw_request("GET / HTTP/1.1", *["X: 1"] * 128), 431),
        case("a field over the limit", raw_request("GET / HTTP/1.1", "X: " + "a" * 998), 431),
        case("an endless field", b"GET / HTTP/1.1\r\nX: " + b"a" * 5_000, 431),
        case(
            "fields over the limit in all",
            raw_request("GET / HTTP/1.1", *["X: " + "a" * 900] * 5),
            431,
        ),
        # Host
        case("no Host", raw_request("GET / HTTP/1.1", host=""), 400),
        case(
            "two types of the body",
            raw_post("/v1/messages", ASKED, "Content-Type: a/b", "Content-Type: application/json"),
            400,
        ),
        case("two Hosts", raw_request("GET / HTTP/1.1", "Host: localhost"), 400),
        case("an empty Host", raw_request("GET / HTTP/1.1", host="Host:"), 400),
        # the length of the body
        *[
            case(
                f"a Content-Length of {value!r}",
                raw_request(
                    "POST /v1/messages HTTP/1.1", f"Content-Length: {value}", body=b"12345"
                ),
                400,
            )
            for value in (
                "+5",
                "-5",
                "0x5",
                "5.0",
                "1_0",
                "5 5",
                "5, 5",
                "5;5",
                "",
                "\xb2",
                "9" * 19,
            )
        ],
        case(
            "two lengths",
            raw_post("/v1/messages", ASKED, "Content-Length: 5"),
            400,
        ),
        case(
            "two types of the body",
            raw_post("/v1/messages", ASKED, "Content-Type: text/html", "Content-Type: a/b"),
            400,
        ),
        case(
            "a length and chunks",
            chunked_post(in_chunks(ASKED_BYTES) + LAST_CHUNK, "Content-Length: 5"),
            400,
        ),
        case(
            "chunks in HTTP/1.0",
            raw_request(
                "POST /v1/messages HTTP/1.0", "Transfer-Encoding: chunked", body=LAST_CHUNK
            ),
            400,
        ),
        *[
            case(
                f"a Transfer-Encoding of {value!r}",
                raw_request(
                    "POST /v1/messages HTTP/1.1", f"Transfer-Encoding: {value}", body=LAST_CHUNK
                ),
                501,
            )
            for value in ("gzip", "identity", "gzip, chunked", "chunked, identity", "xchunked", "")
        ],
        case("chunked twice", chunked_post(LAST_CHUNK, "Transfer-Encoding: chunked"), 501),
        case("a length over the limit", raw_post("/v1/messages", b" " * 10_001), 413),
        case(
            "chunks over the limit", chunked_post(in_chunks(*[b" " * 5_001] * 2) + LAST_CHUNK), 413
        ),
        case(
            "a chunk that is announced over the limit",
            chunked_post(b"ffffffff\r\n" + b" " * 10_001),
            413,
        ),
        case("a body in brotli", raw_post("/v1/messages", ASKED, "Content-Encoding: br"), 415),
        case("no gzip", raw_post("/v1/messages", ASKED, "Content-Encoding: gzip"), 400),
        case(
            "two members of gzip",
            raw_post("/v1/messages", GZIPPED_ASKED * 2, "Content-Encoding: gzip"),
            400,
        ),
        case(
            "a bomb",
            raw_post("/v1/messages", zlib.compress(bytes(10_001)), "Content-Encoding: deflate"),
            413,
        ),
        # chunks
        *[
            case(f"chunks that go {coded[:20]!r}", chunked_post(coded), 400)
            for coded in (
                b"\r\n12345\r\n",
                b"x\r\n",
                b"0x5\r\n12345\r\n",
                b"+5\r\n12345\r\n",
                b"-5\r\n12345\r\n",
                b" 5\r\n12345\r\n",
                b"5 5\r\n12345\r\n",
                b"5\n12345\r\n",
                b"5\r12345\r\n",
                b"5\r\n123456\r\n",
                b"5\r\n12345\n",
                b"5;a\nb\r\n12345\r\n",
                b"5;a\x00\r\n12345\r\n",
                b"000000005\r\n12345\r\n",
                b"5;" + b"a" * 2_000 + b"\r\n12345\r\n",
                b"0\nX: 1\r\n\r\n",
                b"0\r\nX : 1\r\n\r\n",
                b"0\r\nGET /health HTTP/1.1\r\n\r\n",
                b"0\r\nX: 1\nY: 2\r\n\r\n",
                b"0\r\nX: \x00\r\n\r\n",
                b"0\r\n" + b"X: 1\r\n" * 3_000 + b"\r\n",
            )
        ],
        # other protocols
        case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 300, 400),
        case("TLS with a line end in its bytes", b"\x16\x03\x01\n\r\n" + b"a" * 300, 400),
        case("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", 400),
    ],
)
def test_request_that_is_malformed_is_refused_and_ends_the_connection(
    raw: bytes, status: int, served: Served
) -> None:
    server, upstream = served
    before = len(upstream.requests)
    with RawClient(server) as client:
        client.send(raw + b"\r\n\r\n" + POST_MESSAGES)
        answer = client.answer()
        assert client.rest() == b""
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body)["error"]["message"]
    assert upstream.requests[before:] == []


def test_other_protocol_is_answered_and_logged() -> None:
    log = io.StringIO()
    app = shim.App(ScriptedUpstream(), log=shim.Log(log))
    tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 300
    with shim.Server(app) as server:
        for _ in range(2):
            with RawClient(server) as client:
                answer = client.send(tls).answer()
    sentence = "this port speaks plain HTTP, not TLS: use http://"
    assert json.loads(answer.body)["error"]["message"] == sentence
    assert log.getvalue() == f"note: a request was refused: {sentence}\n"


def test_coding_that_is_not_known_is_told_with_those_that_are(served: Served) -> None:
    for path in ("/v1/messages", "/v1/chat/completions"):
        with RawClient(served[0]) as client:
            answer = client.send(raw_post(path, ASKED, "Content-Encoding: zstd")).answer()
        assert (answer.status, answer.headers["accept-encoding"]) == (415, "gzip, deflate")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        case("an unknown path", raw_post("/unknown", POST_MESSAGES), 404),
        case(
            "an unknown path, chunked", chunked_post(in_chunks(POST_MESSAGES), path="/unknown"), 404
        ),
        case(
            "a wrong method", raw_request("PUT /v1/messages HTTP/1.1", "Content-Length: 500"), 405
        ),
        case(
            "an unknown method",
            raw_request("BREW /v1/messages HTTP/1.1", "Content-Length: 500"),
            405,
        ),
        case(
            "a foreign Host",
            raw_post("/v1/messages", POST_MESSAGES).replace(b"localhost", b"evil.net"),
            403,
        ),
        case("a foreign target", raw_post("http://evil.example/v1/messages", POST_MESSAGES), 403),
        case(
            "a foreign page",
            raw_post("/v1/messages", POST_MESSAGES, "Origin: http://evil.example"),
            403,
        ),
        case("a page without origin", raw_post("/v1/messages", POST_MESSAGES, "Origin: null"), 403),
        case(
            "another site",
            raw_post("/v1/messages", POST_MESSAGES, "Sec-Fetch-Site: cross-site"),
            403,
        ),
    ],
)
def test_unread_body_of_a_refused_request_is_never_taken_for_a_request(
    raw: bytes, status: int, served: Served
) -> None:
    server, upstream = served
    before = len(upstream.requests)
    with RawClient(server) as client:
        client.send(raw + POST_MESSAGES)
        answer = client.answer()
        assert client.rest() == b""
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert upstream.requests[before:] == []


@pytest.mark.parametrize(
    ("raw", "status", "allow"),
    [
        case("an unknown path", raw_request("GET /unknown HTTP/1.1"), 404, None),
        case("a wrong method", raw_request("DELETE /v1/messages HTTP/1.1"), 405, "POST"),
        case(
            "a foreign Host", raw_request("GET /health HTTP/1.1", host="Host: e.example"), 403, None
        ),
        case("a preflight", raw_request("OPTIONS /v1/messages HTTP/1.1"), 204, "POST, OPTIONS"),
        case("a preflight for all", raw_request("OPTIONS * HTTP/1.1"), 204, "OPTIONS"),
        case(
            "a preflight of a foreign page",
            raw_request("OPTIONS /v1/messages HTTP/1.1", "Origin: http://evil.example"),
            204,
            "POST, OPTIONS",
        ),
        case(
            "a preflight for a foreign Host",
            raw_request("OPTIONS /v1/messages HTTP/1.1", host="Host: e.example"),
            403,
            None,
        ),
        case(
            "a form of a page of this machine",
            raw_request("POST /v1/messages HTTP/1.1", "Origin: http://localhost:3000"),
            415,
            None,
        ),
        case("a body that is no JSON", raw_post("/v1/messages", b"{"), 400, None),
    ],
)
def test_refusal_of_a_request_that_was_read_keeps_the_connection(
    raw: bytes, status: int, allow: Optional[str], served: Served
) -> None:
    with RawClient(served[0]) as client:
        answer = client.send(raw).answer()
        assert client.send(HEALTH).answer().status == 200
    assert (answer.status, answer.headers.get("allow")) == (status, allow)
    assert [name for name in answer.headers if name.startswith("access-control")] == []
    assert "connection" not in answer.headers


@pytest.mark.parametrize(
    ("raw", "closes", "told"),
    [
        case("HTTP/1.1", raw_request("GET / HTTP/1.1"), False, None),
        case("close", raw_request("GET / HTTP/1.1", "Connection: close"), True, "close"),
        case(
            "close in a list",
            raw_request("GET / HTTP/1.1", "Connection: foo, Close"),
            True,
            "close",
        ),
        case(
            "close in a second field",
            raw_request("GET / HTTP/1.1", "Connection: keep-alive", "Connection: close"),
            True,
            "close",
        ),
        case("a longer word", raw_request("GET / HTTP/1.1", "Connection: closed"), False, None),
        case("HTTP/1.0", raw_request("GET / HTTP/1.0"), True, "close"),
        case("HTTP/1.0 without Host", raw_request("GET / HTTP/1.0", host=""), True, "close"),
        case(
            "HTTP/1.0 that wants more",
            raw_request("GET / HTTP/1.0", "Connection: Keep-Alive"),
            False,
            "keep-alive",
        ),
    ],
)
def test_connection_lives_as_long_as_the_client_wants(
    raw: bytes, closes: bool, told: Optional[str], served: Served
) -> None:
    with RawClient(served[0]) as client:
        answer = client.send(raw).answer()
        assert (answer.status, answer.headers.get("connection")) == (200, told)
        if closes:
            assert client.rest() == b""
        else:
            assert client.send(HEALTH).answer().status == 200


def test_head_is_answered_without_a_body(served: Served) -> None:
    with RawClient(served[0]) as client:
        whole = client.send(HEALTH).answer()
        head = client.send(HEALTH.replace(b"GET", b"HEAD")).answer(to="HEAD")
        after = client.send(HEALTH).answer()
    assert (head.status, head.headers["content-length"]) == (200, str(len(whole.body)))
    assert after.body == whole.body


def test_stream_in_http_1_0_ends_with_the_connection(served: Served) -> None:
    raw = raw_post("/v1/messages", ASKED, "Connection: keep-alive")
    with RawClient(served[0]) as client:
        head, _, body = client.send(raw.replace(b"1.1", b"1.0")).rest().partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"\r\nconnection: close" in head
    assert body == sse(*TEXT_EVENTS)


@pytest.mark.parametrize(
    ("given", "reflected"),
    [
        case("a UUID", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", True),
        case("all characters that may be there", "Az09_.:-", True),
        case("a hundred characters", "a" * 100, True),
        case("more than that", "a" * 101, False),
        case("white space", "a b", False),
        case("markup", "<b>", False),
        case("bytes beyond ASCII", "\xe9", False),
        case("nothing", "", False),
    ],
)
def test_request_id_is_reflected_only_if_safe_s4_b5(
    given: str, reflected: bool, served: Served
) -> None:
    with RawClient(served[0]) as client:
        answer = client.send(raw_request("GET / HTTP/1.1", f"X-Request-Id: {given}")).answer()
    shown = answer.headers["x-request-id"]
    assert (shown == given) is reflected
    assert reflected or re.fullmatch("shim_[0-9a-f]{16}_[0-9a-f]+", shown)


@pytest.mark.parametrize(
    "raw",
    [
        case("a length", raw_post("/v1/messages", ASKED, "Expect: 100-Continue")),
        case("chunks", chunked_post(in_chunks(ASKED_BYTES) + LAST_CHUNK, "Expect: 100-continue")),
    ],
)
def test_client_that_asks_whether_to_go_on_is_told_so(raw: bytes, served: Served) -> None:
    head, empty, body = raw.partition(b"\r\n\r\n")
    with RawClient(served[0]) as client:
        assert client.send(head + empty).until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert client.send(body).answer().status == 200
        assert client.send(HEALTH).answer().status == 200


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        case("without a body", ["Expect: 100-continue"], 400),
        case("with a body over the limit", ["Expect: 100-continue", "Content-Length: 10001"], 413),
        case("from elsewhere", ["Expect: 100-continue", "Content-Length: 9", "Origin: null"], 403),
    ],
)
def test_client_that_asks_whether_to_go_on_is_refused_at_once(
    fields: List[str], status: int, served: Served
) -> None:
    with RawClient(served[0]) as client:
        answer = client.send(raw_request("POST /v1/messages HTTP/1.1", *fields)).answer()
    assert answer.status == status


MARKUP = "<script>alert(1)</script>"


@pytest.mark.parametrize(
    "raw",
    [
        case("a path", raw_request(f"GET /{MARKUP} HTTP/1.1")),
        case("a path of a model", raw_request(f"GET /v1/models/{MARKUP} HTTP/1.1")),
        case("a method", raw_request("G<b> / HTTP/1.1")),
        case("a Host", raw_request("GET / HTTP/1.1", host=f"Host: {MARKUP}")),
        case("an Origin", raw_request("GET / HTTP/1.1", f"Origin: http://{MARKUP}")),
        case("a request id", raw_request("GET /unknown HTTP/1.1", f"X-Request-Id: {MARKUP}")),
        case("a coding", raw_post("/v1/messages", ASKED, f"Content-Encoding: {MARKUP}")),
        case("a model", raw_post("/v1/messages", {**ASKED, "model": MARKUP})),
        case("a model for OpenAI", raw_post("/v1/chat/completions", {**ASKED, "model": MARKUP})),
        case("a value", raw_post("/v1/chat/completions", {**ASKED, "tool_choice": MARKUP})),
        case("a body", raw_post("/v1/chat/completions", MARKUP.encode())),
    ],
)
def test_what_a_client_sent_is_never_markup_in_an_answer(raw: bytes, served: Served) -> None:
    with RawClient(served[0]) as client:
        head = client.send(raw).until(b"\r\n\r\n")
        body = client.exactly(int(re.findall(rb"content-length: (\d+)", head)[0]))
    assert b"<" not in head + body
    assert json.loads(body)["error"]["message"]
    for field in (
        b"content-type: application/json",
        b"x-content-type-options: nosniff",
        b"content-security-policy: default-src 'none'; frame-ancestors 'none'",
        b"cache-control: no-store",
    ):
        assert field in head.split(b"\r\n")


KEYED = shim.ClientKeys({"ann": "s3cret"})


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        case("no key", [], 401),
        case("a wrong key", ["Authorization: Bearer s3cret2"], 401),
        case("a key beyond ASCII", ["X-Api-Key: s3cr\xe9t"], 401),
        case("no key, and a question whether to go on", ["Expect: 100-continue"], 401),
        case("no key, and a proxy's word", ["X-Forwarded-For: 127.0.0.1"], 401),
        case("no key, and a body in brotli", ["Content-Encoding: br"], 401),
        case("no key, and a foreign page", ["Origin: http://evil.example"], 403),
        case("a key, and a foreign page", ["X-Api-Key: s3cret", "Origin: http://e.example"], 403),
        case("a key, and a body in brotli", ["X-Api-Key: s3cret", "Content-Encoding: br"], 415),
        case("a key", ["authorization: bearer s3cret"], 200),
        case("a key as Azure's clients send it", ["api-key: s3cret"], 200),
    ],
)
def test_key_is_checked_after_the_origin_and_before_the_body_s3_b26(
    fields: List[str], status: int
) -> None:
    app, upstream = app_on(streamed(*TEXT_EVENTS), client_keys=KEYED)
    with shim.Server(app) as server, RawClient(server) as client:
        raw = raw_post("/v1/messages", POST_MESSAGES if status != 200 else ASKED, *fields)
        answer = client.send(raw).answer()
        if status == 200:
            assert client.send(POST_MESSAGES).answer().status == 401
            assert client.rest() == b""
        else:
            assert client.rest() == b""
            assert answer.headers["connection"] == "close"
    assert answer.status == status
    assert len(upstream.requests) == (status == 200)


def test_key_that_asked_is_the_one_that_sees_a_response_again() -> None:
    keys = shim.ClientKeys({"ann": "s3cret-a", "bob": "s3cret-b"})
    app, _ = app_on(streamed(*TEXT_EVENTS), client_keys=keys)
    statuses = []
    with shim.Server(app) as server:
        for key in ("s3cret-b", "s3cret-a"):
            with RawClient(server) as client:
                asking = {"model": "claude-opus-5-5", "input": "hi"}
                made = client.send(
                    raw_post("/v1/responses", asking, "Authorization: Bearer s3cret-a")
                ).answer()
                head = f"GET /v1/responses/{json.loads(made.body)['id']} HTTP/1.1"
                raw = raw_request(head, f"Authorization: Bearer {key}")
                statuses.append(client.send(raw).answer().status)
    app.close()
    assert statuses == [404, 200]


def test_key_is_asked_for_before_the_size_of_the_body_counts() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS), client_keys=KEYED)
    with shim.Server(app) as server, RawClient(server) as client:
        raw = raw_request("POST /v1/messages HTTP/1.1", "Content-Length: 99999999999")
        assert client.send(raw).answer().status == 401
        assert client.rest() == b""


def test_refusal_arrives_whole_and_the_rest_of_the_body_is_still_taken() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app) as server, RawClient(server) as client:
        raw = raw_post("/unknown", bytes(500_000))
        answer = client.send(raw[:-100_000]).answer()
        assert (answer.status, client.rest()) == (404, b"")
        for _ in range(100):
            client.send(bytes(1_000))  # a connection that was closed rudely would break here


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        case("nothing", b"", None),
        case("half a request line", b"GET / HT", 408),
        case("half a head", b"GET / HTTP/1.1\r\nHost: localhost\r\n", 408),
        case("half a body", POST_MESSAGES[:-1], 408),
        case("half a chunk", chunked_post(b"5\r\n123"), 408),
    ],
)
def test_request_that_does_not_come_in_time(raw: bytes, status: Optional[int]) -> None:
    app, upstream = app_on(streamed(*TEXT_EVENTS))
    limits = shim.ServerLimits(idle_seconds=0.05, head_seconds=0.05, body_pause_seconds=0.05)
    with shim.Server(app, limits=limits) as server, RawClient(server) as client:
        if status:
            answer = client.send(raw).answer()
            assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert client.rest() == b""
    assert upstream.requests == []


def test_body_has_a_limit_in_all_too_s3_b15_s3_b16_s4_b31() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    limits = shim.ServerLimits(body_seconds=0.05)
    with shim.Server(app, limits=limits) as server, RawClient(server) as client:
        assert client.send(POST_MESSAGES[:-1]).answer().status == 408


class RecordedSocket(socket.socket):
    """Remembers what was sent in one call."""

    def send(self, piece: Any, flags: int = 0) -> int:
        RECORDED.append(bytes(piece))
        return super().send(piece, flags)


RECORDED: List[bytes] = []


class RecordedServer(shim.Server):
    """A server that remembers what it sent in one call."""

    def get_request(self) -> Any:
        sock, address = super().get_request()
        return RecordedSocket(sock.family, sock.type, sock.proto, sock.detach()), address


def test_head_and_first_bytes_of_the_body_go_in_one_send() -> None:
    app, _ = app_on((200, {"content-type": "text/event-stream"}, [sse(*TEXT_EVENTS)]))
    with RecordedServer(app) as server, RawClient(server) as client:
        RECORDED.clear()
        client.send(HEALTH).answer()
        client.send(POST_MESSAGES).answer()
    firsts = [piece.partition(b"\r\n")[0] for piece in RECORDED if piece != LAST_CHUNK]
    assert firsts == [b"HTTP/1.1 200 OK"] * 2


# --- client <- server <- upstream


def app_before(url: str, **limits: float) -> shim.App:
    """An App whose upstream is on real sockets."""
    policy = shim.Policy(live_models=False, retries=shim.RetryPolicy(0), prompt_cache="off")
    key = shim.APIKey("sk-ant-api03-upstream", "the test")
    return shim.App(shim.HTTPUpstream(url, limits=shim.Limits(**limits)), key, policy)


EVENTS = sse(*TEXT_EVENTS)
WHOLE_STREAM = STREAM_HEAD + in_chunks(EVENTS) + LAST_CHUNK
FIRST_EVENTS = sse(*TEXT_EVENTS[:4])  # up to and with the first text
LAST_EVENTS = sse(*TEXT_EVENTS[4:])
BEGUN = STREAM_HEAD + in_chunks(FIRST_EVENTS)


def said(stream: bytes) -> str:
    """The text of the chunks of a chat stream."""
    deltas = [
        choice["delta"]
        for piece in chunks(stream)
        if piece != "[DONE]"
        for choice in piece.get("choices", [])
    ]
    return "".join(delta.get("content") or "" for delta in deltas)


def assert_whole_chat(answer: RawAnswer) -> None:
    assert answer.status == 200
    assert said(answer.body) == "Hell\u00f6 \u4e16\U0001f600"
    last, done = chunks(answer.body)[-2:]
    assert (last["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")


@pytest.mark.parametrize(
    "script",
    [
        case("in one piece", [WHOLE_STREAM]),
        case(
            "an event a piece", [STREAM_HEAD, *[in_chunks(sse(e)) for e in TEXT_EVENTS], LAST_CHUNK]
        ),
        case("one byte at a time", [bytes([byte]) for byte in WHOLE_STREAM]),
        case(
            "one byte a chunk",
            [STREAM_HEAD + in_chunks(*[bytes([byte]) for byte in EVENTS]) + LAST_CHUNK],
        ),
        case(
            "until it closes",
            [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", EVENTS, CLOSE],
        ),
        case(
            "of a known length",
            [
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
                % len(EVENTS)
                + EVENTS
            ],
        ),
    ],
)
def test_stream_comes_through_whole(script: List[Any]) -> None:
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        relayed = client.send(POST_MESSAGES).answer()
        assert (relayed.status, relayed.body) == (200, EVENTS)
        assert_whole_chat(client.send(POST_CHAT).answer())
        at_once = json.loads(client.send(POST_CHAT_AT_ONCE).answer().body)
        choice = at_once["choices"][0]
        assert choice["message"]["content"] == "Hell\u00f6 \u4e16\U0001f600"
        assert choice["finish_reason"] == "stop"


def test_upstream_connection_is_used_again_after_whole_streams() -> None:
    with (
        FakeUpstream([WHOLE_STREAM]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        for raw in (POST_MESSAGES, POST_CHAT, POST_CHAT_AT_ONCE, POST_CHAT, POST_MESSAGES):
            assert client.send(raw).answer().status == 200
        assert (len(fake.requests), fake.connections) == (5, 1)


def test_pause_that_comes_with_the_end_of_the_body_is_resumed() -> None:
    go = threading.Event()
    events, mark, rest = b"".join(PAUSED_ANSWER[2]).partition(b"event: message_delta")
    begun = STREAM_HEAD + in_chunks(events)
    end = in_chunks(mark + rest) + LAST_CHUNK  # nothing of it is for the client
    resumed = STREAM_HEAD + in_chunks(*RESUMED[2]) + LAST_CHUNK
    with (
        FakeUpstream([begun, go, end], [resumed]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(raw_post("/v1/chat/completions", {**SEARCHING, "stream": True}))
        client.until(b"\r\n\r\n")
        shown = client.until(b"One ")
        go.set()
        assert said(unchunked(shown + client.until(LAST_CHUNK))) == "One two."


def test_request_reaches_upstream_with_its_key_and_not_the_client_s() -> None:
    with (
        FakeUpstream([WHOLE_STREAM]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(raw_post("/v1/messages", ASKED, "Authorization: Bearer mine", "Cookie: c=1"))
        assert client.answer().status == 200
    head, _, body = fake.requests[0].partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        "POST /v1/messages HTTP/1.1",
        f"Host: {fake.host}",
        "Accept-Encoding: identity",
        "anthropic-version: 2023-06-01",
        "x-api-key: sk-ant-api03-upstream",
        f"Content-Length: {len(ASKED_BYTES)}",
    ]
    assert body == ASKED_BYTES


ERROR_EVENT: JSON = {
    "type": "error",
    "error": {"type": "overloaded_error", "message": "Overloaded"},
}

BREAKS = [
    case("cut before the first event", [STREAM_HEAD, CLOSE]),
    *[
        case(
            f"cut between chunks, after event {count}",
            [STREAM_HEAD + in_chunks(sse(*TEXT_EVENTS[:count])), CLOSE],
        )
        for count in range(1, len(TEXT_EVENTS))
    ],
    case("cut in a chunk", [STREAM_HEAD + b"%x\r\n" % len(EVENTS) + FIRST_EVENTS, CLOSE]),
    case("cut in a character", [STREAM_HEAD + in_chunks(EVENTS.partition(b"\xb8")[0]), CLOSE]),
    case("cut in the last event", [STREAM_HEAD + in_chunks(EVENTS[:-20]), CLOSE]),
    case("reset", [BEGUN, RESET]),
    case("ended regularly but too early", [BEGUN + LAST_CHUNK]),
    case(
        "cut in its length",
        [
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 9999\r\n\r\n"
            + FIRST_EVENTS,
            CLOSE,
        ],
    ),
    case("followed by malformed chunks", [BEGUN + b"what is this?\r\n", UNTIL_GONE]),
    case("silent", [BEGUN, UNTIL_GONE]),
    case("an error by its last event", [BEGUN + in_chunks(sse(ERROR_EVENT)) + LAST_CHUNK]),
]


@pytest.mark.parametrize("script", BREAKS)
def test_chat_stream_that_breaks_never_looks_finished_s3_b11_s3_b12_s3_b13(
    script: List[Any],
) -> None:
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url, silence=0.2)) as server,
        RawClient(server) as client,
    ):
        head, _, coded = client.send(POST_CHAT).rest().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert not coded.endswith(LAST_CHUNK)
    body = unchunked(coded)
    assert b"[DONE]" not in body
    *before, last = chunks(body)
    assert last["error"]["type"] == "server_error"
    reasons = [c["finish_reason"] for piece in before for c in piece.get("choices", [])]
    assert [reason for reason in reasons if reason] == []


@pytest.mark.parametrize("script", BREAKS)
def test_messages_stream_that_breaks_never_looks_finished(script: List[Any]) -> None:
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url, silence=0.2)) as server,
        RawClient(server) as client,
    ):
        head, _, coded = client.send(POST_MESSAGES).rest().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert not coded.endswith(LAST_CHUNK)
    types = [
        event["type"] for event in chunks(unchunked(coded).decode().encode("ascii", "replace"))
    ]
    assert "message_stop" not in types
    assert (types[-1:], types.count("error")) == (["error"], 1)


@pytest.mark.parametrize("script", BREAKS)
def test_chat_answer_that_breaks_is_an_error_s3_b13(script: List[Any]) -> None:
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url, silence=0.2)) as server,
        RawClient(server) as client,
    ):
        answer = client.send(POST_CHAT_AT_ONCE).answer()
        assert answer.status in (502, 503, 504)
        assert json.loads(answer.body)["error"]["type"] == "server_error"
        assert client.send(HEALTH).answer().status == 200


GOING: List[Any] = [
    case(
        "messages, while upstream is silent in the middle", POST_MESSAGES, [BEGUN, UNTIL_GONE], True
    ),
    case("chat, while upstream is silent in the middle", POST_CHAT, [BEGUN, UNTIL_GONE], True),
    case("chat at once, in the middle", POST_CHAT_AT_ONCE, [BEGUN, UNTIL_GONE], False),
    case("chat at once, after the head", POST_CHAT_AT_ONCE, [STREAM_HEAD, UNTIL_GONE], False),
    case("chat, after the head", POST_CHAT, [STREAM_HEAD, UNTIL_GONE], False),
    case("chat, before upstream's head", POST_CHAT, [UNTIL_GONE], False),
    case("chat at once, before upstream's head", POST_CHAT_AT_ONCE, [UNTIL_GONE], False),
    case("messages, before upstream's head", POST_MESSAGES, [UNTIL_GONE], False),
]


def leave(client: RawClient, how: str) -> None:
    if how == "by FIN":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        reset_on_close(client.sock)
        client.sock.close()


@pytest.mark.parametrize("how", ["by FIN", "by RST"])
@pytest.mark.parametrize(("raw", "script", "heard"), GOING)
def test_client_that_hangs_up_closes_upstream_s3_b10_s4_b6(
    raw: bytes, script: List[Any], heard: bool, how: str
) -> None:
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(raw)
        assert fake.stalled.acquire(timeout=PATIENCE)
        if heard:
            client.until(b"Hel")
        assert not fake.gone.is_set()
        leave(client, how)
        assert fake.gone.wait(PATIENCE)


@pytest.mark.parametrize(("raw", "script", "heard"), GOING)
def test_client_that_hangs_up_closes_a_tls_upstream(
    raw: bytes, script: List[Any], heard: bool, tls_server: ssl.SSLContext
) -> None:
    """Session tickets make a TLS socket readable without a byte for us."""
    with FakeUpstream(script, tls=tls_server) as fake:
        url = f"https://localhost:{fake.host.partition(':')[2]}"
        app = app_before(fake.url)
        app.upstream = shim.HTTPUpstream(url, context=trusting())
        with shim.Server(app) as server, RawClient(server) as client:
            client.send(raw)
            assert fake.stalled.acquire(timeout=PATIENCE)
            if heard:
                client.until(b"Hel")
            leave(client, "by FIN")
            assert fake.gone.wait(PATIENCE)


def test_client_that_hangs_up_while_upstream_does_not_read_its_body_closes_upstream() -> None:
    reading = threading.Event()
    large = {**ASKED, "messages": [{"role": "user", "content": "x" * (16 << 20)}]}
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def swallow_nothing() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(2 * PATIENCE)
                sock.recv(1)
                reading.set()
                with contextlib.suppress(OSError):
                    while sock.recv(1 << 20, socket.MSG_PEEK) and not closed.wait(0.01):
                        pass

        closed = threading.Event()
        thread = threading.Thread(target=swallow_nothing)
        thread.start()
        app = app_before(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with shim.Server(app) as server:
            with RawClient(server) as client:
                client.send(raw_post("/v1/messages", large))
                assert reading.wait(PATIENCE)
            left = time.monotonic()
            server.stop()  # joins the request's thread, which waits for nobody
            assert time.monotonic() - left < PATIENCE
        closed.set()
        thread.join(PATIENCE)


ERROR_EVENT = sse({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}})


def test_connection_of_a_failed_answer_is_not_closed_under_the_next_request() -> None:
    failed = STREAM_HEAD + in_chunks(FIRST_EVENTS + ERROR_EVENT) + LAST_CHUNK
    with (
        FakeUpstream([failed], [WHOLE_STREAM]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        statuses = [client.send(POST_CHAT_AT_ONCE).answer().status for _ in range(3)]
    assert statuses == [503, 200, 200]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        case("a stream", POST_CHAT, b'"busy"'),
        case("an answer at once", POST_CHAT_AT_ONCE, b'"busy"'),
    ],
)
def test_error_event_is_told_at_once_though_upstream_stays(raw: bytes, told: bytes) -> None:
    failed = STREAM_HEAD + in_chunks(FIRST_EVENTS + ERROR_EVENT)
    with (
        FakeUpstream([failed, UNTIL_GONE]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(raw).until(told)
        assert fake.gone.wait(PATIENCE)


def test_relayed_answer_without_a_body_leaves_none_behind() -> None:
    """RFC 9112 6.3: a 204 has no chunks, which would be the next answer."""
    raw = raw_request("DELETE /v1/files/file_1 HTTP/1.1", "anthropic-version: 2023-06-01")
    with (
        FakeUpstream([b"HTTP/1.1 204 No Content\r\n\r\n"]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        assert [client.send(raw).answer().status for _ in range(2)] == [204, 204]


def test_ids_are_upstreams_own_or_counted_and_never_collide_s3_b22_s4_b21() -> None:
    """Four threads draw 500 ids each; a completion takes the id of its message."""
    app, _ = app_on(streamed(message_start(id="msg_7"), *TEXT_EVENTS[1:]))
    drawn: List[str] = []
    with shim.Server(app) as server:
        draws = [
            threading.Thread(
                target=lambda: drawn.extend(server.new_request_id() for _ in range(500))
            )
            for _ in range(4)
        ]
        for thread in draws:
            thread.start()
        for thread in draws:
            thread.join()
        with RawClient(server) as client:
            answer = json.loads(client.send(POST_CHAT_AT_ONCE).answer().body)
    assert answer["id"] == "chatcmpl-msg_7"
    assert len(set(drawn)) == 2000


@pytest.mark.parametrize(
    "text", ["conversation_label: x", "chat id: 7", "<tool_use>{}</tool_use>", "NO_REPLY"]
)
def test_words_of_a_system_message_change_nothing_s4_b16(text: str) -> None:
    app, upstream = app_on(streamed(*TEXT_EVENTS))
    messages = [{"role": "system", "content": text}, *QUESTION["messages"]]
    assert ask(app, CHAT, {**QUESTION, "messages": messages}).status == 200
    (body,) = upstream.bodies()
    assert body["system"] == [{"type": "text", "text": text}]
    assert body["messages"] == [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert "tools" not in body


def test_server_may_be_stopped_twice() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app) as server:
        server.stop()


def test_server_for_other_machines_wants_a_client_key() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with pytest.raises(shim.ConfigError, match="client key"):
        shim.Server(app, "0.0.0.0")


def test_client_that_hangs_up_while_upstream_talks_closes_upstream_s3_b28() -> None:
    def endless() -> Iterator[bytes]:
        end = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < end:
            yield in_chunks(sse(text_delta(0, "x" * 10_000)))

    with FakeUpstream([BEGUN, endless()]) as fake, shim.Server(app_before(fake.url)) as server:
        with RawClient(server) as client:
            client.send(POST_CHAT).until(b"xxx")
        assert fake.gone.wait(PATIENCE)


def test_client_that_takes_nothing_any_more_is_gone() -> None:
    def endless() -> Iterator[bytes]:
        end = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < end:
            yield in_chunks(sse(text_delta(0, "x" * 100_000)))

    limits = shim.ServerLimits(write_seconds=1.0)
    with (
        FakeUpstream([BEGUN, endless()]) as fake,
        shim.Server(app_before(fake.url), limits=limits) as server,
        RawClient(server) as client,
    ):
        client.send(POST_CHAT).until(b"Hel")
        assert fake.gone.wait(PATIENCE)


def test_client_that_takes_a_little_is_not_gone() -> None:
    """The system tells only of much room to send, as of a third of its buffer."""
    script = [BEGUN, in_chunks(*[sse(text_delta(0, "x" * 100_000))] * 300)]
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(POST_CHAT).until(b"Hel")
        connection = next(iter(server.connections))
        wait_until(lambda: connection.backlog > 256 << 10)
        taken = sum(len(client.sock.recv(100_000)) for _ in range(10))
        asked = threading.Event()

        def ask_when_due() -> None:
            connection.tick(connection._sent_at + 60)
            asked.set()

        server.relay.call(connection, ask_when_due)
        assert asked.wait(PATIENCE)
        assert (taken > 0, connection.closed) == (True, False)


def test_slow_reader_gets_everything() -> None:
    texts = [text_delta(0, f"{number:05} " + "x" * 10_000) for number in range(500)]
    events = sse(*TEXT_EVENTS[:2], *texts, *TEXT_EVENTS[-3:])
    script = [STREAM_HEAD, in_chunks(events[:1_000_000], events[1_000_000:]) + LAST_CHUNK]
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(POST_MESSAGES)
        received, last = [b""], b""
        while not last.endswith(LAST_CHUNK):
            received.append(client.sock.recv(4_000))
            assert received[-1]
            last = b"".join(received[-2:])
    head, _, coded = b"".join(received).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert unchunked(coded) == events


def test_malformed_request_disturbs_no_other_connection() -> None:
    go = threading.Event()
    with (
        FakeUpstream([BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(POST_CHAT).until(b"\r\n\r\n")
        assert fake.stalled.acquire(timeout=PATIENCE)
        for raw in (
            b"\x00\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            chunked_post(b"x\r\n"),
            POST_MESSAGES[:9],
        ):
            with RawClient(server) as other:
                other.send(raw).sock.shutdown(socket.SHUT_WR)
                other.rest()
        go.set()
        body = unchunked(client.until(LAST_CHUNK))
    assert said(body) == "Hell\u00f6 \u4e16\U0001f600"
    assert chunks(body)[-1] == "[DONE]"


def test_request_sent_during_a_stream_is_answered_after_it() -> None:
    go = threading.Event()
    with (
        FakeUpstream([BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as client,
    ):
        client.send(POST_CHAT)
        assert fake.stalled.acquire(timeout=PATIENCE)
        client.send(HEALTH)
        go.set()
        assert_whole_chat(client.answer())
        assert json.loads(client.answer().body)["status"] == "ok"


def test_fifty_streams_at_once() -> None:
    go = threading.Event()
    script = [BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]
    with (
        FakeUpstream(script) as fake,
        shim.Server(app_before(fake.url)) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(RawClient(server)) for _ in range(50)]
        for client in clients:
            client.send(POST_CHAT)
        for _ in clients:
            assert fake.stalled.acquire(timeout=PATIENCE)  # all of them are open at once
        with RawClient(server) as another:
            assert another.send(HEALTH).answer().status == 200
        go.set()
        for client in clients:
            assert_whole_chat(client.answer())
        assert fake.connections == 50


def test_stop_leaves_nothing_though_a_stream_is_open() -> None:
    with FakeUpstream([BEGUN, UNTIL_GONE]) as fake:
        limits = shim.ServerLimits(drain_seconds=0.1)
        server = shim.Server(app_before(fake.url), limits=limits).start()
        with RawClient(server) as client, RawClient(server) as idle, RawClient(server) as begun:
            begun.send(b"GET / HT")
            assert idle.send(HEALTH).answer().status == 200
            client.send(POST_CHAT).until(b"Hel")
            server.stop()
            assert not client.rest().endswith(LAST_CHUNK)
            assert idle.rest() == b""
            begun.rest()
            assert fake.gone.wait(PATIENCE)
            with pytest.raises(ConnectionRefusedError):
                RawClient(server)


def test_stop_lets_a_stream_end_that_is_about_to() -> None:
    go = threading.Event()
    with FakeUpstream([BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]) as fake:
        server = shim.Server(app_before(fake.url)).start()
        with RawClient(server) as client:
            client.send(POST_CHAT)
            assert fake.stalled.acquire(timeout=PATIENCE)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            go.set()
            assert_whole_chat(client.answer())
            assert client.rest() == b""
            stopping.join(PATIENCE)


def test_port_that_is_taken_is_an_error() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app) as server, pytest.raises(OSError, match="in use"):
        shim.Server(app, port=server.server_address[1])


# --- silence


QUICK = shim.ServerLimits(heartbeat_seconds=0.02)


def test_silence_is_filled_with_heartbeats_s3_b29() -> None:
    go = threading.Event()
    with (
        FakeUpstream([BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]) as fake,
        shim.Server(app_before(fake.url), limits=QUICK) as server,
        RawClient(server) as client,
    ):
        client.send(POST_CHAT)
        for _ in range(3):
            client.until(b": keep-alive\n\n")
        go.set()
        assert client.until(LAST_CHUNK).endswith(b"data: [DONE]\n\n\r\n" + LAST_CHUNK)


def test_heartbeats_do_not_prolong_the_silence() -> None:
    with (
        FakeUpstream([BEGUN, UNTIL_GONE]) as fake,
        shim.Server(app_before(fake.url, silence=0.2), limits=QUICK) as server,
        RawClient(server) as client,
    ):
        made = client.send(POST_CHAT).rest()
        assert made.count(b": keep-alive\n\n") >= 2
        assert b"upstream fell silent" in made
        assert not made.endswith(LAST_CHUNK)


def test_client_that_leaves_during_silence_is_noticed_s3_b10() -> None:
    with (
        FakeUpstream([BEGUN, UNTIL_GONE]) as fake,
        shim.Server(app_before(fake.url), limits=QUICK) as server,
    ):
        with RawClient(server) as client:
            client.send(POST_CHAT).until(b": keep-alive\n\n")
        assert fake.gone.wait(PATIENCE)


def test_client_that_leaves_after_a_long_request_in_a_row_is_noticed() -> None:
    long = {**ASKED, "messages": [{"role": "user", "content": "x" * 40_000}]}
    with (
        FakeUpstream([go := threading.Event(), WHOLE_STREAM], [UNTIL_GONE]) as fake,
        shim.Server(app_before(fake.url)) as server,
    ):
        with RawClient(server) as client:
            client.send(POST_CHAT)
            assert fake.asked.acquire(timeout=PATIENCE)
            client.send(raw_post("/v1/chat/completions", long))
            wait_until(lambda: any(len(c._reader) > shim.PROMPT_BYTES for c in server.connections))
            go.set()
            assert fake.asked.acquire(timeout=PATIENCE)
        assert fake.gone.wait(PATIENCE)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        case("chat", POST_CHAT, b": keep-alive\n\n"),
        case("messages", POST_MESSAGES, b'event: ping\ndata: {"type": "ping"}\n\n'),
    ],
)
def test_heartbeat_of_a_dialect_means_nothing(raw: bytes, expected: bytes) -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    path = raw.split(b" ")[1].decode()
    body = ask(app, path, {**ASKED, "stream": True}).body
    assert isinstance(body, shim.Stream)
    assert body.transform.heartbeat == expected


# --- load


def waiting_server(fake: FakeUpstream, **limits: float) -> shim.Server:
    return shim.Server(app_before(fake.url), limits=shim.ServerLimits()._replace(**limits))


def test_idle_connections_cost_no_thread_and_hold_up_nobody() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(RawClient(server)) for _ in range(200)]
        assert all(client.send(HEALTH).answer().status == 200 for client in idle)
        threads = {thread.name for thread in threading.enumerate()}
        assert len(threads) < 10
        with RawClient(server) as client:
            assert_whole_chat(client.send(POST_CHAT).answer())


def test_requests_over_the_limit_wait_and_are_answered_in_order() -> None:
    go = threading.Event()
    script = [BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]
    with (
        FakeUpstream(script, [WHOLE_STREAM]) as fake,
        waiting_server(fake, max_concurrent=1) as server,
        RawClient(server) as first,
        RawClient(server) as second,
        RawClient(server) as third,
    ):
        first.send(POST_CHAT)
        assert fake.stalled.acquire(timeout=PATIENCE)
        second.send(POST_CHAT)
        third.send(POST_MESSAGES)
        assert third.sock.gettimeout()
        with RawClient(server) as other:
            assert other.send(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n").answer().status
        assert len(fake.requests) == 1
        go.set()
        for client in (first, second):
            assert_whole_chat(client.answer())
        assert third.answer().status == 200
        assert len(fake.requests) == 3


def test_client_that_leaves_the_line_takes_no_turn_s4_b2() -> None:
    go = threading.Event()
    script = [BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]
    with (
        FakeUpstream(script, [WHOLE_STREAM]) as fake,
        waiting_server(fake, max_concurrent=1, max_waiting=1) as server,
        RawClient(server) as first,
    ):
        first.send(POST_CHAT)
        assert fake.stalled.acquire(timeout=PATIENCE)
        with RawClient(server) as leaving, RawClient(server) as refused:
            leaving.send(POST_CHAT)
            while refused.send(POST_CHAT).answer().status != 503:
                pass  # until `leaving` is in line
        with RawClient(server) as last:
            answer = last.send(POST_CHAT)
            go.set()
            assert_whole_chat(first.answer())
            assert answer.answer().status in (200, 503)
        assert len(fake.requests) <= 2


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        case("chat", POST_CHAT, 503, "server_is_overloaded"),
        case("messages", POST_MESSAGES, 529, None),
    ],
)
def test_request_whose_turn_does_not_come_is_refused(
    raw: bytes, status: int, code: Optional[str]
) -> None:
    with (
        FakeUpstream([BEGUN, UNTIL_GONE]) as fake,
        waiting_server(fake, max_concurrent=1, wait_seconds=0.05) as server,
        RawClient(server) as first,
        RawClient(server) as second,
    ):
        first.send(POST_CHAT)
        assert fake.stalled.acquire(timeout=PATIENCE)
        answer = second.send(raw).answer()
        assert (answer.status, answer.headers["retry-after"]) == (status, "5")
        assert json.loads(answer.body)["error"].get("code") == code
        assert len(fake.requests) == 1


def test_few_large_requests_run_at_a_time_and_small_ones_overtake_them() -> None:
    go = threading.Event()
    large = raw_post("/v1/messages", {**ASKED, "padding": "x" * (2 << 20)})
    with (
        FakeUpstream([go, WHOLE_STREAM], [WHOLE_STREAM]) as fake,
        waiting_server(fake, max_large=1) as server,
        RawClient(server) as first,
        RawClient(server) as second,
        RawClient(server) as small,
    ):
        first.send(large)
        assert fake.stalled.acquire(timeout=PATIENCE)
        second.send(large)
        assert_whole_chat(small.send(POST_CHAT).answer())
        assert len(fake.requests) == 2
        go.set()
        assert first.answer().status == second.answer().status == 200


class Listener(shim.Party):
    """A party that reads what it is told of."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard: List[bytes] = []

    def on_ready(self) -> None:
        self.heard.append(self.sock.recv(100))


@contextlib.contextmanager
def relayed_pair(relay: shim.Relay) -> Iterator[Tuple[Listener, socket.socket]]:
    """A party whose socket the relay watches, and the other end of that."""
    near, far = socket.socketpair()
    with near, far:
        party = Listener(near)
        relay.watch(near, selectors.EVENT_READ, party)
        yield party, far


@pytest.fixture
def relay() -> Iterator[shim.Relay]:
    faults: List[Exception] = []
    relay = shim.Relay(lambda error, where: faults.append(error))
    yield relay
    relay.stop()
    assert faults == []


def turn(relay: shim.Relay) -> None:
    relay.call(shim.Party(), lambda: None)  # so that there is something to do
    relay._turn()


@pytest.mark.parametrize("rests", [True, False])
def test_relay_tells_of_a_resting_socket_only_who_watches_it_again(
    relay: shim.Relay, rests: bool
) -> None:
    relay._rests = relay._rests and rests
    with relayed_pair(relay) as (first, far):
        relay.rest(first.sock)
        second = Listener(first.sock)
        relay.watch(first.sock, selectors.EVENT_READ, second)
        far.sendall(b"a")
        turn(relay)
        assert (first.heard, second.heard) == ([], [b"a"])


def test_relay_looks_no_more_at_a_resting_socket_that_stirs(relay: shim.Relay) -> None:
    with relayed_pair(relay) as (party, far):
        relay.rest(party.sock)
        far.sendall(b"a")
        turn(relay)
        assert party.heard == []
        assert party.sock not in relay._watched  # else each turn would be told of it
        relay.watch(party.sock, selectors.EVENT_READ, party)
        turn(relay)
        assert party.heard == [b"a"]


def test_relay_watches_a_socket_with_the_number_of_one_that_was_closed_at_rest(
    relay: shim.Relay,
) -> None:
    with relayed_pair(relay) as (old, _):
        relay.rest(old.sock)
        near, far = socket.socketpair()
        number = old.sock.fileno()
        old.sock.close()
        os.dup2(near.fileno(), number, inheritable=False)
        near.close()
        with far, socket.socket(fileno=number) as sock:
            new = Listener(sock)
            relay.watch(sock, selectors.EVENT_READ, new)
            far.sendall(b"a")
            turn(relay)
            assert (old.heard, new.heard) == ([], [b"a"])
            assert old.sock not in relay._watched


def test_relay_forgets_a_socket_that_was_closed_first(relay: shim.Relay) -> None:
    with relayed_pair(relay) as (party, _):
        number = party.sock.fileno()
        party.sock.close()
        relay.unwatch(party.sock)
        assert number not in relay._numbered
        assert party.sock not in relay._watched


def test_relay_skips_a_closed_socket_that_a_program_being_started_still_holds(
    relay: shim.Relay,
) -> None:
    """epoll tells of it as long as any descriptor of it is open."""
    with relayed_pair(relay) as (party, far):
        held = os.dup(party.sock.fileno())
        relay.rest(party.sock)
        party.sock.close()
        far.sendall(b"a")
        for _ in range(3):
            turn(relay)
        os.close(held)
        assert party.heard == []


def test_relay_does_not_know_a_socket_that_it_could_not_watch(relay: shim.Relay) -> None:
    """Else who gives up over that fails once more, and is never forgotten."""
    with socket.socket() as sock:
        sock.close()
        with pytest.raises(ValueError, match="descriptor"):
            relay.watch(sock, selectors.EVENT_READ, shim.Party())
        relay.unwatch(sock)


def test_gate_lets_in_so_many_in_a_second() -> None:
    class Queued(shim.Exchange):
        def __init__(self) -> None:
            self.relay, self.large = relay, False

        def begin(self) -> None:
            begun.append(self)

        def wait_for_turn(self) -> None:
            pass

    class Prompt(shim.Relay):
        def soon(self, party: shim.Party, function: Callable[[], None]) -> None:
            function()

    relay = Prompt(lambda error, where: None)
    begun: List[shim.Exchange] = []
    gate = shim.Gate(shim.ServerLimits(requests_per_second=2.0))
    asked = [Queued() for _ in range(4)]
    for exchange in asked:
        gate.enter(exchange)
    assert begun == asked[:2]  # a second's worth at once
    now = time.monotonic()
    assert now < gate.tick(now) <= now + 0.5
    gate.tick(now + 0.5)
    assert begun == asked[:3]
    relay.stop()


def test_many_that_wait_and_are_answered_at_once_all_get_their_turn() -> None:
    go = threading.Event()
    with (
        FakeUpstream([BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]) as fake,
        waiting_server(fake, max_concurrent=1) as server,
        RawClient(server) as first,
        contextlib.ExitStack() as stack,
    ):
        first.send(POST_CHAT)
        assert fake.stalled.acquire(timeout=PATIENCE)
        waiting = [stack.enter_context(RawClient(server)).send(HEALTH) for _ in range(300)]
        go.set()
        assert_whole_chat(first.answer())
        assert {client.answer().status for client in waiting} == {200}


def test_rate_limit_lets_those_in_who_wait_behind_a_long_answer() -> None:
    with (
        FakeUpstream([WHOLE_STREAM]) as fake,
        waiting_server(fake, max_concurrent=1, requests_per_second=20.0) as server,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(RawClient(server)).send(POST_CHAT) for _ in range(30)]
        assert {client.answer().status for client in clients} == {200}


def test_flood_of_pipelined_requests_is_held_back_and_answered_in_order() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app) as server, RawClient(server) as flood, RawClient(server) as other:
        sender = threading.Thread(target=flood.send, args=(HEALTH * 30_000,))
        sender.start()
        assert other.send(HEALTH).answer().status == 200
        assert max(connection.backlog for connection in server.connections) < 1 << 20
        for _ in range(30_000):
            assert flood.answer().status == 200
        sender.join()


def test_large_request_to_an_upstream_that_does_not_read_holds_up_nobody() -> None:
    body = {**ASKED, "n": 2, "messages": [{"role": "user", "content": "x" * (8 << 20)}]}
    with (
        FakeUpstream([EARLY, WHOLE_STREAM, UNTIL_GONE], [WHOLE_STREAM]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as large,
        RawClient(server) as small,
    ):
        large.send(raw_post("/v1/chat/completions", {**body, "stream": False}))
        for _ in range(20):
            assert small.send(HEALTH).answer().status == 200


def test_count_that_is_answered_by_events_holds_up_nobody() -> None:
    with (
        FakeUpstream([BEGUN, UNTIL_GONE]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as counting,
        RawClient(server) as small,
    ):
        asked = {"model": "sonnet", "input": "hi"}
        counting.send(raw_post("/v1/responses/input_tokens", asked))
        assert fake.stalled.acquire(timeout=PATIENCE)
        assert small.send(HEALTH).answer().status == 200


def test_slow_reader_holds_back_its_own_upstream_and_nobody_else() -> None:
    filler = in_chunks(sse(message_start())) + in_chunks(sse({"type": "ping"}) * 2000) * 4000
    with (
        FakeUpstream([STREAM_HEAD, iter([filler] * 3), UNTIL_GONE], [WHOLE_STREAM]) as fake,
        shim.Server(app_before(fake.url)) as server,
        RawClient(server) as slow,
        RawClient(server) as quick,
    ):
        slow.send(POST_MESSAGES).until(b"message_start")
        assert_whole_chat(quick.send(POST_CHAT).answer())
        assert max(connection.backlog for connection in server.connections) < 4 << 20


def test_running_out_of_descriptors_makes_room_instead_of_spinning() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    limits = shim.ServerLimits(max_connections=3)
    with shim.Server(app, limits=limits) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(RawClient(server)) for _ in range(3)]
        assert all(client.send(HEALTH).answer().status == 200 for client in idle)
        last = stack.enter_context(RawClient(server))
        assert last.send(HEALTH).answer().status == 200


def test_work_that_takes_long_does_not_hold_up_other_requests() -> None:
    go = threading.Event()

    class Slow(ScriptedUpstream):
        def send(self, request: shim.UpstreamRequest) -> shim.UpstreamResponse:
            if b"wait" in request.body:
                assert go.wait(PATIENCE)
            return super().send(request)

    app = shim.App(Slow(streamed(*TEXT_EVENTS)), policy=shim.Policy(live_models=False))
    body = {**ASKED, "messages": [{"role": "user", "content": "wait"}]}
    raw = json.dumps(body).encode()
    with shim.Server(app) as server, RawClient(server) as slow, RawClient(server) as quick:
        slow.send(raw_post("/v1/chat/completions", raw))
        assert_whole_chat(quick.send(POST_CHAT).answer())
        go.set()
        assert slow.answer().status == 200


LIMIT_PARTS = [
    case("one process has all", 1, 10, [10]),
    case("shares that are equal", 2, 10, [5, 5]),
    case("shares that are not", 4, 10, [2, 3, 2, 3]),
    case("too little for all, where each must have some", 3, 2, [1, 1, 1]),
]


@pytest.mark.parametrize(("count", "limit", "expected"), LIMIT_PARTS)
def test_processes_have_their_parts_of_a_limit(count: int, limit: int, expected: List[int]) -> None:
    whole = shim.ServerLimits(max_concurrent=limit, max_large=limit)
    parts = [whole.part(number, count) for number in range(count)]
    assert [part.max_concurrent for part in parts] == expected
    assert [part.max_large for part in parts] == expected


def test_parts_of_limits_add_up() -> None:
    whole = shim.ServerLimits(
        max_body=7, max_held=100, max_waiting=2, requests_per_second=1.0, max_connections=5
    )
    parts = [whole.part(number, 4) for number in range(4)]
    assert [part.max_waiting for part in parts] == [0, 1, 0, 1]
    assert [part.requests_per_second for part in parts] == [0.25] * 4
    assert [part.max_connections for part in parts] == [5] * 4  # descriptors are a process's own
    assert [part.max_held for part in parts] == [25] * 4
    assert whole._replace(max_body=60).part(0, 4).max_held == 60  # or no such body ever came in


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is one process only")
def test_processes_tell_each_other_what_they_remember() -> None:
    crowd = memoryview(bytearray(12)).cast("I")
    boxes = [shim.letter_box() for _ in range(3)]
    thinking = [{"type": "thinking", "thinking": "x" * 30_000, "signature": "s\u00f6"}]
    servers = [shim.Server(app_on(FINE)[0]) for _ in boxes]
    for number, server in enumerate(servers):
        server.take_part(number, crowd, boxes)
    with servers[0], servers[1], servers[2]:
        first, *others = [server.app.memory for server in servers]
        first.remember(["toolu_1", "toolu_2"], thinking)
        deadline = time.monotonic() + PATIENCE
        while not all(memory.recall("toolu_2") for memory in others):
            assert time.monotonic() < deadline
        recalled = [memory.recall("toolu_1") for memory in (first, *others)]
        assert recalled == [thinking] * 3
        assert first.tell is not None
        for _ in range(2000):  # nobody waits for a box that is full
            first.tell(b"[[],[]]")
    for ends in boxes:
        for end in ends:
            end.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is one process only")
def test_letter_that_would_be_cut_is_not_sent() -> None:
    """Linux lets through twice the bytes that were set, if the system's limit allows those."""
    boxes = [shim.letter_box() for _ in range(2)]
    writer = boxes[0][1]
    writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    memories = [shim.ThinkingMemory() for _ in boxes]
    first, _ = [shim.Letters(memory, n, boxes) for n, memory in enumerate(memories)]
    for size in (1_100_000, 100):
        memories[1].remember([f"toolu_{size}"], [{"type": "thinking", "thinking": "x" * size}])
    first.on_ready()
    assert [len(memories[0].recall(f"toolu_{size}")) for size in (1_100_000, 100)] == [0, 1]
    for end in (*boxes[0], *boxes[1]):
        end.close()


def test_client_that_leaves_while_a_worker_has_its_request_frees_its_place() -> None:
    go, begun = threading.Event(), threading.Event()

    class Stuck(ScriptedUpstream):
        def send(self, request: shim.UpstreamRequest) -> shim.UpstreamResponse:
            begun.set()
            assert go.wait(PATIENCE)
            return super().send(request)

    app = shim.App(Stuck(streamed(*TEXT_EVENTS)), policy=shim.Policy(live_models=False))
    limits = shim.ServerLimits(max_concurrent=1)
    with shim.Server(app, limits=limits) as server, RawClient(server) as other:
        with RawClient(server) as leaving:
            leaving.send(POST_CHAT)
            assert begun.wait(PATIENCE)
        assert other.send(HEALTH).answer().status == 200
        go.set()
        assert_whole_chat(other.send(POST_CHAT).answer())


def test_upload_after_the_last_answer_is_not_kept() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app) as server, RawClient(server) as client:
        client.send(b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n")
        assert client.answer().status == 403
        with contextlib.suppress(OSError):
            for _ in range(200):
                client.send(bytes(100_000))
        assert sum(len(connection._reader) for connection in list(server.connections)) < 1 << 20


ZEROS = bytes(200_000)


@pytest.mark.parametrize(
    "raw",
    [
        case("of a known length", raw_post("/v1/messages", ZEROS)),
        case(
            "in chunks",
            raw_request("POST /v1/messages HTTP/1.1", "Transfer-Encoding: chunked")
            + in_chunks(*[ZEROS[:5_000]] * 40)
            + LAST_CHUNK,
        ),
    ],
)
def test_bodies_that_are_on_their_way_have_a_limit_in_common(raw: bytes) -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    limits = shim.ServerLimits(max_held=300_000)
    with (
        shim.Server(app, limits=limits) as server,
        RawClient(server) as first,
        RawClient(server) as second,
        RawClient(server) as third,
    ):
        first.send(raw[:-1])
        wait_until(lambda: server.held > 199_000)
        assert second.send(raw[:-1]).answer().status == 529
        assert first.send(raw[-1:]).answer().status == 400
        assert third.send(raw).answer().status == 400
        assert server.held == 0


def test_bytes_of_a_client_that_is_gone_are_let_go_once() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    raw = raw_post("/v1/messages", ZEROS)
    limits = shim.ServerLimits(max_held=300_000)
    go = threading.Event()
    with shim.Server(app, limits=limits) as server, RawClient(server) as other:
        other.send(raw[:-1])
        wait_until(lambda: server.held > 199_000)
        with RawClient(server) as leaving:
            leaving.send(raw[:80_000])
            wait_until(lambda: server.held > 279_000)
            server.relay.call(shim.Party(), lambda: go.wait(PATIENCE))
            leaving.send(raw[80_000:110_000])  # too many: refused, but nobody is there any more
            reset_on_close(leaving.sock)
        go.set()
        wait_until(lambda: len(server.connections) == 1)
        assert 199_000 < server.held <= 200_000


def test_new_limits_count_for_those_who_wait() -> None:
    with (
        FakeUpstream([BEGUN, UNTIL_GONE], [WHOLE_STREAM]) as fake,
        waiting_server(fake, max_concurrent=1) as server,
        RawClient(server) as first,
        RawClient(server) as second,
    ):
        first.send(POST_CHAT)
        assert fake.stalled.acquire(timeout=PATIENCE)
        second.send(POST_CHAT)
        server.gate.limits = server.gate.limits._replace(max_concurrent=2)
        while not fake.asked.acquire(timeout=0.01) or len(fake.requests) < 2:
            server.relay.call(server.gate, lambda: server.gate.advance(server.relay))
        assert_whole_chat(second.answer())


def test_log_that_nobody_reads_stops_no_answer() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    read, write = os.pipe()
    with open(read, "rb"), open(write, "w", encoding="ascii") as pipe:
        app.log = shim.Log(pipe)
        with shim.Server(app) as server, RawClient(server) as client:
            for _ in range(2_000):
                client.send(HEALTH).answer()
        os.set_blocking(read, False)
        while os.read(read, 1 << 16).endswith(b"\n") and not app.log._takes_a_line():
            pass
        app.log.write("then")
        assert b" lines were lost\nthen\n" in os.read(read, 1 << 20)


# --- other listeners


def test_unix_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "shim.sock"
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app, f"unix:{path}") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert server.url == f"unix:{path}"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(HEALTH)
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        with pytest.raises(OSError, match="in use"):
            shim.Server(app, f"unix:{path}")
    assert not path.exists()


def test_unix_socket_that_nobody_serves_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "shim.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    app, _ = app_on(streamed(*TEXT_EVENTS))
    with shim.Server(app, f"unix:{path}"):
        pass
    (tmp_path / "precious").write_text("a file")
    with pytest.raises(OSError, match="in use"):
        shim.Server(app, f"unix:{tmp_path / 'precious'}")


def test_listening_socket_can_be_inherited() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with shim.Server(app, f"fd:{listener.detach()}") as server, RawClient(server) as client:
        assert server.url == f"http://127.0.0.1:{port}"
        assert client.send(HEALTH).answer().status == 200


def test_inherited_socket_that_others_can_reach_needs_a_client_key() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    listener = socket.create_server(("0.0.0.0", 0))
    with pytest.raises(shim.ConfigError, match="set a client key"):
        shim.Server(app, f"fd:{listener.detach()}")


def tls_client(server: shim.Server) -> RawClient:
    client = RawClient(server)
    client.sock = trusting().wrap_socket(client.sock, server_hostname="localhost")
    return client


def test_tls_listener_serves_requests_and_streams(tls_server: ssl.SSLContext) -> None:
    with FakeUpstream([WHOLE_STREAM]) as fake:
        server = shim.Server(app_before(fake.url))
        server.tls = tls_server
        with server, RawClient(server) as silent, tls_client(server) as client:
            assert server.url.startswith("https://")
            assert client.send(HEALTH).answer().status == 200
            assert_whole_chat(client.send(POST_CHAT).answer())
            assert silent.send(HEALTH).rest() == b""  # plain HTTP


def test_tls_client_that_leaves_is_noticed(tls_server: ssl.SSLContext) -> None:
    with FakeUpstream([BEGUN, UNTIL_GONE]) as fake:
        server = shim.Server(app_before(fake.url))
        server.tls = tls_server
        with server:
            with tls_client(server) as client:
                client.send(POST_CHAT).until(b"Hel")
            assert fake.gone.wait(PATIENCE)


# --- the end


def test_stop_lets_running_answers_end_and_says_so_to_health_checks() -> None:
    go = threading.Event()
    with FakeUpstream([BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]) as fake:
        server = shim.Server(app_before(fake.url)).start()
        with RawClient(server) as client, RawClient(server) as begun:
            begun.send(HEALTH[:-2])
            client.send(POST_CHAT)
            assert fake.stalled.acquire(timeout=PATIENCE)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            while not server.draining:
                pass
            go.set()
            assert_whole_chat(client.answer())
            stopping.join(PATIENCE)
            assert not stopping.is_alive()


@pytest.mark.parametrize(
    "limits",
    [
        case("when the server stops", {"drain_seconds": 60.0}),
        case("when the idle limit is short", {"idle_seconds": 0.01}),
    ],
)
def test_answer_that_is_still_going_out_is_not_cut(limits: JSON) -> None:
    large = json.dumps({"id": "msg_1", "padding": "x" * (24 << 20)}).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(large)}\r\n\r\n"
    )
    with FakeUpstream([head.encode() + large]) as fake:
        server = shim.Server(app_before(fake.url), limits=shim.ServerLimits(**limits)).start()
        with RawClient(server) as client:
            client.send(raw_post("/v1/messages", {**ASKED, "stream": False})).until(b"padding")
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            rest = client.rest()
            stopping.join(PATIENCE)
        assert rest.endswith((b'x"}', LAST_CHUNK))


def test_answer_that_does_not_end_in_time_is_cut_by_an_error_s4_b28() -> None:
    with FakeUpstream([BEGUN, UNTIL_GONE]) as fake:
        limits = shim.ServerLimits(drain_seconds=0.05)
        server = shim.Server(app_before(fake.url), limits=limits).start()
        with RawClient(server) as client:
            client.send(POST_CHAT).until(b"Hel")
            server.stop()
            made = client.rest()
            assert b"claude_shim is being stopped" in made
            assert not made.endswith(LAST_CHUNK)


# ----------------------------------------------------------------------
# 14. Command line
# ----------------------------------------------------------------------


def settings_of(
    *argv: str, env: Optional[Dict[str, str]] = None, file: Optional[Dict[str, str]] = None
) -> shim.Settings:
    """The settings of a command line, an environment and a configuration file."""
    arguments = shim.argument_parser().parse_args(argv)
    return shim.settings_from(arguments, env or {}, file or {})


def chosen(settings: shim.Settings, env: Dict[str, str]) -> shim.Credential:
    """The credential that these come to, where there is no keychain."""
    outside = shim.outside(settings, shim.Log())._replace(run=run_of(44, ""))
    return shim.credential_from(settings, env, outside)


def test_options_are_the_fields_of_settings() -> None:
    assert [option.field for option in shim.OPTIONS] == list(shim.Settings._fields)
    assert len({option.variable for option in shim.OPTIONS}) == len(shim.OPTIONS)


def test_settings_without_any() -> None:
    assert settings_of()._asdict() == {
        "host": "127.0.0.1",
        "port": 8765,
        "upstream": "http",
        "base_url": "https://api.anthropic.com",
        "auth": "auto",
        "fallback_auth": "",
        "api_key_file": "",
        "setup_token_file": "",
        "allow_odd_token": False,
        "bundle": "",
        "key_helper": "",
        "key_helper_ttl": 300.0,
        "token_url": (
            "https://platform.claude.com/v1/oauth/token",
            "https://console.anthropic.com/v1/oauth/token",
        ),
        "oauth_client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        "oauth_scope": "user:profile user:inference",
        "client_key_file": "",
        "allow_host": (),
        "allow_origin": (),
        "alias": {},
        "opus": "",
        "sonnet": "",
        "haiku": "",
        "prompt_cache": "5m",
        "strict": False,
        "max_body": 33_554_432,
        "responses_store": "memory",
        "retries": 2,
        "connect_timeout": 10.0,
        "first_byte_timeout": 300.0,
        "silence_timeout": 300.0,
        "total_timeout": 3600.0,
        "ca_file": "",
        "client_cert": "",
        "upstream_header": (),
        "allow_plain_http": False,
        "unix": "",
        "tls_cert": "",
        "tls_key": "",
        "max_concurrent": 256,
        "max_waiting": 1024,
        "requests_per_second": 0.0,
        "drain_seconds": 30.0,
        "workers": 1,
        "quiet": False,
    }


IN_ENV, IN_FILE = {"CLAUDE_SHIM_PORT": "2"}, {"port": "3"}

PRECEDENCE = [
    case("the command line first", ["--port", "1"], IN_ENV, IN_FILE, 1),
    case("then the environment", [], IN_ENV, IN_FILE, 2),
    case("then the file", [], {}, IN_FILE, 3),
    case("then the default", [], {}, {}, 8765),
    case("an empty variable is none (S1-R2)", [], {"CLAUDE_SHIM_PORT": ""}, IN_FILE, 3),
]


@pytest.mark.parametrize(("argv", "env", "file", "expected"), PRECEDENCE)
def test_precedence_of_settings(argv: List[str], env: Any, file: Any, expected: int) -> None:
    assert settings_of(*argv, env=env, file=file).port == expected


PARSED = [
    case("a switch", ["--strict"], "strict", True),
    case("a size in mebibytes", ["--max-body", "64M"], "max_body", 67_108_864),
    case("a size in bytes", ["--max-body", "1000"], "max_body", 1000),
    case("a fraction of seconds", ["--connect-timeout", "0.5"], "connect_timeout", 0.5),
    case(
        "a URL with /v1",
        ["--base-url", "https://g.example/p/v1/"],
        "base_url",
        "https://g.example/p",
    ),
    case(
        "several names",
        ["--allow-host", "a.example", "--allow-host", "b.example,c.example"],
        "allow_host",
        ("a.example", "b.example", "c.example"),
    ),
    case(
        "names with what belongs to a URL",
        ["--allow-host", "My.Example:8765 [FE80::1]"],
        "allow_host",
        ("my.example", "fe80::1"),
    ),
    case(
        "origins of all kinds",
        [
            *("--allow-origin", "https://app.example https://app.example:8443"),
            *("--allow-origin", "app://obsidian.md,http://[::1]:3000"),
        ],
        "allow_origin",
        (
            *("https://app.example", "https://app.example:8443"),
            *("app://obsidian.md", "http://[::1]:3000"),
        ),
    ),
    case(
        "several aliases",
        ["--alias", "gpt-4o*=sonnet", "--alias", "gpt-3.5*=haiku"],
        "alias",
        {"gpt-4o*": "sonnet", "gpt-3.5*": "haiku"},
    ),
    case(
        "headers",
        ["--upstream-header", "X-Team: a, b", "--upstream-header", "X-Other:c"],
        "upstream_header",
        (("X-Team", "a, b"), ("X-Other", "c")),
    ),
]


@pytest.mark.parametrize(("argv", "name", "expected"), PARSED)
def test_settings_are_parsed(argv: List[str], name: str, expected: Any) -> None:
    assert getattr(settings_of(*argv), name) == expected


def test_switch_can_be_set_and_unset_by_environment_and_file() -> None:
    assert settings_of(env={"CLAUDE_SHIM_STRICT": "on"}).strict is True
    assert settings_of(env={"CLAUDE_SHIM_STRICT": "no"}, file={"strict": "yes"}).strict is False
    assert settings_of(file={"strict": "TRUE"}).strict is True


BAD_SETTINGS = [
    case(
        "a port of the command line",
        {"argv": ["--port", "x"]},
        "--port: expected a port from 0 to 65535, got 'x'",
    ),
    case(
        "a port of the environment",
        {"env": {"CLAUDE_SHIM_PORT": "70000"}},
        "environment variable CLAUDE_SHIM_PORT: expected a port from 0 to 65535, got '70000'",
    ),
    case(
        "a port of the file",
        {"file": {"port": "-1"}},
        "configuration file, port: expected a port from 0 to 65535, got '-1'",
    ),
    case(
        "a path that none is",
        {"file": {"api-key-file": "a\0b"}},
        "configuration file, api-key-file: a NUL byte has no place here, got 'a\\x00b'",
    ),
    case(
        "a kind of upstream",
        {"argv": ["--upstream", "ftp"]},
        "--upstream: expected one of http, echo, got 'ftp'",
    ),
    case(
        "a switch",
        {"env": {"CLAUDE_SHIM_STRICT": "maybe"}},
        "environment variable CLAUDE_SHIM_STRICT: expected yes or no, got 'maybe'",
    ),
    case(
        "no time at all",
        {"argv": ["--silence-timeout", "0"]},
        "--silence-timeout: expected seconds over zero, got '0'",
    ),
    case(
        "a time that is no number",
        {"argv": ["--silence-timeout", "nan"]},
        "--silence-timeout: expected seconds over zero, got 'nan'",
    ),
    case(
        "a size",
        {"argv": ["--max-body", "0"]},
        "--max-body: expected a size such as 32M, got '0'",
    ),
    case(
        "a number of tries",
        {"argv": ["--retries", "-1"]},
        "--retries: expected a whole number, got '-1'",
    ),
    *[
        case(
            f"a host of {host!r}",
            {"argv": ["--allow-host", host]},
            f"--allow-host: expected a host name such as my.example, got {host!r}",
        )
        for host in ("https://my.example", "my.example/", "*", "*.example", "a:b", "u@my.example")
    ],
    *[
        case(
            f"an origin of {origin!r}",
            {"argv": ["--allow-origin", origin]},
            "--allow-origin: expected an origin as browsers write it, "
            f"such as https://app.example:8443, got {origin!r}",
        )
        for origin in (
            *("*", "null", "https://*.example", "app.example", "https://", "file://"),
            *("https://app.example/", "https://app.example/x", "https://app.example?x"),
            *("HTTPS://app.example", "https://App.example", "https://u@app.example"),
            *("http://app.example:80", "https://app.example:443", "https://app.example:"),
        )
    ],
    case(
        "an alias",
        {"argv": ["--alias", "gpt-4o"]},
        "--alias: expected NAME=MODEL, where NAME may hold *, got 'gpt-4o'",
    ),
    case(
        "an unknown setting of the file",
        {"file": {"prot": "1"}},
        "the configuration file has an unknown setting: prot",
    ),
]


@pytest.mark.parametrize(("given", "message"), BAD_SETTINGS)
def test_bad_setting_is_told_with_its_source(given: JSON, message: str) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        settings_of(*given.get("argv", ()), env=given.get("env"), file=given.get("file"))
    assert str(caught.value) == message


REFUSED_SETTINGS = [
    case("a URL of another kind", ["--base-url", "ftp://u:hunter2@h.example"]),
    case("a URL with a port that is none", ["--base-url", "https://h.example:x"]),
    case("a URL with a port beyond all", ["--base-url", "https://h.example:99999"]),
    case("a URL with a password", ["--base-url", "https://u:hunter2@h.example"]),
    case("a URL with a query", ["--base-url", "https://h.example/?key=hunter2"]),
    case("a header without a colon", ["--upstream-header", "Authorization hunter2"]),
    case("a header that frames", ["--upstream-header", "Content-Length: 5"]),
    case("a header with a control character", ["--upstream-header", "X-Key: hunter2\x07"]),
    case("a header of two lines", ["--upstream-header", "X-Key: hunter2\rHost: evil"]),
]


@pytest.mark.parametrize("argv", REFUSED_SETTINGS)
def test_refused_setting_shows_no_secret(argv: List[str]) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        settings_of(*argv)
    assert str(caught.value).startswith(f"{argv[0]}: ")
    assert "hunter2" not in str(caught.value)


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.ini"
    path.write_text("[claude_shim]\nport = 99\nalias = gpt-4o*=sonnet\n  gpt-3*=haiku\n# no\n")
    values = shim.config_values(str(path), {})
    assert values == {"port": "99", "alias": "gpt-4o*=sonnet\ngpt-3*=haiku"}
    assert settings_of(file=values).alias == {"gpt-4o*": "sonnet", "gpt-3*": "haiku"}


def test_config_file_of_the_platform(tmp_path: Path) -> None:
    folder = tmp_path / "claude-shim"
    folder.mkdir()
    env = {"XDG_CONFIG_HOME": str(tmp_path), "APPDATA": str(tmp_path)}
    assert shim.config_values(None, env) == {}
    (folder / "config.ini").write_text("[claude_shim]\nport = 98\n")
    assert shim.config_values(None, env) == {"port": "98"}


BAD_FILES = [
    case("no section", "port = 1\n", "File contains no section headers"),
    case("another section", "[other]\nport = 1\n", "has no section [claude_shim]"),
    case("the same twice", "[claude_shim]\nport = 1\nport = 2\n", "already exists"),
    case("not UTF-8", b"[claude_shim]\nport = \xff\n", "not UTF-8"),
]


@pytest.mark.parametrize(("text", "reason"), BAD_FILES)
def test_bad_config_file_is_told_in_one_line(
    tmp_path: Path, text: Union[str, bytes], reason: str
) -> None:
    path = tmp_path / "config.ini"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(shim.ConfigError) as caught:
        shim.config_values(str(path), {})
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    for read in (
        lambda: shim.config_values(gone, {}),
        lambda: chosen(settings_of("--api-key-file", gone), {}),
        lambda: shim.client_keys_from(settings_of("--client-key-file", gone), {}),
    ):
        with pytest.raises(shim.ConfigError) as caught:
            read()
        assert str(caught.value) == f"cannot read {gone}: No such file or directory"


def test_text_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Notepad and PowerShell write one."""
    path = tmp_path / "key"
    path.write_bytes(b"\xef\xbb\xbfsk-ant-1\r\n")
    credential = chosen(settings_of("--api-key-file", str(path)), {})
    assert credential.authorization({}) == [("x-api-key", "sk-ant-1")]


API_KEY_ENV = {"ANTHROPIC_API_KEY": "sk-ant-env"}

CREDENTIALS_CHOSEN = [
    case("the environment", [], API_KEY_ENV, [("x-api-key", "sk-ant-env")]),
    case(
        "a file before it", ["--api-key-file", "KEY"], API_KEY_ENV, [("x-api-key", "sk-ant-file")]
    ),
    case("passthrough", ["--auth", "passthrough"], API_KEY_ENV, [("x-api-key", "c")]),
    case("the echo asks for none", ["--upstream", "echo"], API_KEY_ENV, []),
]


@pytest.mark.parametrize(("argv", "env", "expected"), CREDENTIALS_CHOSEN)
def test_credential_is_chosen(tmp_path: Path, argv: List[str], env: Any, expected: Any) -> None:
    path = tmp_path / "key"
    path.write_text("sk-ant-file\n")
    settings = settings_of(*[str(path) if word == "KEY" else word for word in argv])
    assert chosen(settings, env).authorization({"x-api-key": "c"}) == expected


@pytest.mark.parametrize("env", [{}, {"ANTHROPIC_API_KEY": " "}])
def test_no_credential_tells_three_ways_and_the_echo(env: Dict[str, str]) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        chosen(settings_of(), env)
    for way in ("ANTHROPIC_API_KEY=", "--api-key-file", "--auth passthrough", "--upstream echo"):
        assert way in str(caught.value)


SETUP_TOKEN = "sk-ant-oat01-" + "s" * 90
LOGIN = json.dumps(
    {"access_token": "sk-ant-oat01-b", "refresh_token": "sk-ant-ort01-r", "expires_at": 9e9}
)
ENDED_LOGIN = json.dumps(
    {"access_token": "sk-ant-oat01-old", "refresh_token": "sk-ant-ort01-r", "expires_at": 5}
)
CLAUDE_LOGIN = claude_code_login("sk-ant-oat01-c", 9e12)
PROFILE = json.dumps(
    {
        "version": "1.0",
        "workspace_id": "wrkspc_1",
        "base_url": "http://127.0.0.1:PORT",
        "authentication": {"type": "user_oauth", "client_id": "client-1"},
    }
)
FEDERATED = json.dumps(
    {
        "version": "1.0",
        "organization_id": "org_1",
        "base_url": "http://127.0.0.1:PORT",
        "authentication": {
            "type": "oidc_federation",
            "federation_rule_id": "fdrl_1",
            "identity_token": {"source": "file", "path": "HOME/jwt"},
        },
    }
)
BUNDLE_FILE = ".local/state/claude-shim/oauth.json"
PROFILES = ".config/anthropic"
CLAUDE_FILE = ".claude/.credentials.json"
FEDERATION_ENV = {
    "ANTHROPIC_FEDERATION_RULE_ID": "fdrl_1",
    "ANTHROPIC_ORGANIZATION_ID": "org_1",
    "ANTHROPIC_IDENTITY_TOKEN": "jwt-1",
}


def laid(home: Path, files: Dict[str, str], port: str = "9") -> None:
    """Write files below a home folder, for their owner alone."""
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        secret_file(path, text.replace("PORT", port).replace("HOME", str(home)))


def json_bytes(body: Any, status: str = "200 OK") -> bytes:
    """An answer with a JSON body on the wire."""
    raw = json.dumps(body).encode()
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(raw), raw)


GRANTED = json_bytes(
    {"access_token": "sk-ant-oat01-new", "refresh_token": "sk-ant-ort01-r2", "expires_in": 99}
)
GIVEN_BETA = "given-1,oauth-2025-04-20"


def oauth_of(token: str, **more: str) -> Dict[str, str]:
    return {"authorization": f"Bearer {token}", "anthropic-beta": GIVEN_BETA, **more}


# argv, environment, files, what is asked of the token endpoint, headers at upstream
END_TO_END = [
    case(
        "an API key",
        [],
        {"ANTHROPIC_API_KEY": "sk-ant-api03-a"},
        {},
        None,
        {"x-api-key": "sk-ant-api03-a", "anthropic-beta": "given-1"},
    ),
    case(
        "a bearer token",
        [],
        {"ANTHROPIC_AUTH_TOKEN": "gateway-token"},
        {},
        None,
        {"authorization": "Bearer gateway-token", "anthropic-beta": "given-1"},
    ),
    case(
        "a bearer token that is OAuth",
        ["--auth", "auth-token"],
        {"ANTHROPIC_AUTH_TOKEN": "sk-ant-oat01-x"},
        {},
        None,
        oauth_of("sk-ant-oat01-x"),
    ),
    case(
        "passthrough",
        ["--auth", "passthrough"],
        {"ANTHROPIC_API_KEY": "sk-ant-api03-a"},
        {},
        None,
        {"x-api-key": "of-the-client", "anthropic-beta": "given-1"},
    ),
    case(
        "a setup token (S1-R7)",
        [],
        {"CLAUDE_CODE_OAUTH_TOKEN": SETUP_TOKEN},
        {},
        None,
        oauth_of(SETUP_TOKEN),
    ),
    case(
        "a setup token in a file",
        ["--setup-token-file", "HOME/setup"],
        {},
        {"setup": f"{SETUP_TOKEN}\n"},
        None,
        oauth_of(SETUP_TOKEN),
    ),
    case("a login (S1-B1)", [], {}, {BUNDLE_FILE: LOGIN}, None, oauth_of("sk-ant-oat01-b")),
    case(
        "a login that has ended",
        ["--bundle", "HOME/login", "--oauth-client-id", "client-2"],
        {},
        {"login": ENDED_LOGIN},
        {"grant_type": "refresh_token", "refresh_token": "sk-ant-ort01-r", "client_id": "client-2"},
        oauth_of("sk-ant-oat01-new"),
    ),
    case(
        "Claude Code's login (S1-R11)",
        ["--auth", "claude-code"],
        {},
        {CLAUDE_FILE: CLAUDE_LOGIN},
        None,
        oauth_of("sk-ant-oat01-c"),
    ),
    case(
        "Claude Code's login in a folder of its own",
        [],
        {"CLAUDE_CONFIG_DIR": "HOME/elsewhere"},
        {"elsewhere/.credentials.json": CLAUDE_LOGIN},
        None,
        oauth_of("sk-ant-oat01-c"),
    ),
    case(
        "the profile that is active",
        [],
        {},
        {
            f"{PROFILES}/active_config": "work\n",
            f"{PROFILES}/configs/work.json": PROFILE,
            f"{PROFILES}/credentials/work.json": LOGIN,
        },
        None,
        oauth_of("sk-ant-oat01-b", **{"anthropic-workspace-id": "wrkspc_1"}),
    ),
    case(
        "a profile by name whose login has ended",
        [],
        {"ANTHROPIC_PROFILE": "home", "ANTHROPIC_CONFIG_DIR": "HOME/p"},
        {"p/configs/home.json": PROFILE, "p/credentials/home.json": ENDED_LOGIN},
        {"grant_type": "refresh_token", "refresh_token": "sk-ant-ort01-r", "client_id": "client-1"},
        oauth_of("sk-ant-oat01-new", **{"anthropic-workspace-id": "wrkspc_1"}),
    ),
    case(
        "a profile of workload identity",
        [],
        {},
        {f"{PROFILES}/configs/default.json": FEDERATED, "jwt": "jwt-1\n"},
        {
            "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "assertion": "jwt-1",
            "federation_rule_id": "fdrl_1",
            "organization_id": "org_1",
        },
        oauth_of("sk-ant-oat01-new"),
    ),
    case(
        "workload identity by the environment",
        ["--auth", "federation"],
        {**FEDERATION_ENV, "ANTHROPIC_SERVICE_ACCOUNT_ID": "svac_1"},
        {},
        {
            "grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
            "assertion": "jwt-1",
            "federation_rule_id": "fdrl_1",
            "organization_id": "org_1",
            "service_account_id": "svac_1",
        },
        oauth_of("sk-ant-oat01-new"),
    ),
    case(
        "a helper",
        ["--key-helper", "echo sk-ant-api03-h"],
        {},
        {},
        None,
        {"x-api-key": "sk-ant-api03-h", "anthropic-beta": "given-1"},
    ),
]


def request_fields(raw: bytes) -> Dict[str, str]:
    """The header fields of a request on the wire that concern credentials; none may come twice."""
    lines = raw.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    pairs = [(name.lower(), value) for name, value in (line.split(": ", 1) for line in lines)]
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names)), names
    wanted = re.compile("authorization|x-api-key|api-key|anthropic-(beta|workspace-id)")
    return {name: value for name, value in pairs if wanted.fullmatch(name)}


@pytest.mark.parametrize(("argv", "env", "files", "granting", "expected"), END_TO_END)
def test_every_credential_from_its_place_to_upstream(
    tmp_path: Path, argv: List[str], env: Any, files: Any, granting: Any, expected: Any
) -> None:
    log = io.StringIO()
    with FakeUpstream(*([[GRANTED]] if granting else []), [FINE_ANSWER]) as fake:
        laid(tmp_path, files, fake.host.rpartition(":")[2])
        settings = settings_of(
            *("--port", "0", "--base-url", fake.url, "--token-url", f"{fake.url}/v1/oauth/token"),
            *[word.replace("HOME", str(tmp_path)) for word in argv],
        )
        env = {name: value.replace("HOME", str(tmp_path)) for name, value in env.items()}
        with shim.server_from(settings, {"HOME": str(tmp_path), **env}, log) as server:
            with RawClient(server) as client:
                fields = ("anthropic-beta: given-1", "x-api-key: of-the-client")
                assert client.send(raw_request("GET /v1/skills HTTP/1.1", *fields)).answer().status
            text = shim.welcome(server) + repr(server.app.credential)
    *asked, request = fake.requests
    assert request_fields(request) == expected
    assert [json.loads(raw.partition(b"\r\n\r\n")[2]) for raw in asked] == [granting] * len(asked)
    assert all(raw.startswith(b"POST /v1/oauth/token HTTP/1.1\r\n") for raw in asked)
    assert bool(asked) is bool(granting)
    secret = expected.get("x-api-key") or expected["authorization"].partition(" ")[2]
    assert secret not in log.getvalue() + text
    assert ("notice: " in log.getvalue()) is (
        shim.KINDS[server.app.credential.describe().kind].claude_ai
    )


TOKEN_FAULTS = [
    case(
        "HTML with status 200",
        [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"],
        f"answered with what is no token: {NO_TOKEN}",
    ),
    case(
        "it closes",
        [CLOSE],
        "gave no answer: no answer from upstream: upstream closed the connection without an answer",
    ),
    case(
        "it closes in the middle",
        [b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n{", CLOSE],
        "gave no answer: upstream hung up in the middle of the answer",
    ),
    case(
        "it redirects to another host",
        [b"HTTP/1.1 308 Moved\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"],
        "redirects to http://evil.example, which is not followed: check --token-url",
    ),
    case(
        "it hangs",
        [UNTIL_GONE],
        "gave no answer: upstream did not start to answer in time",
    ),
    case(
        "it hangs in the middle",
        [b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n{", UNTIL_GONE],
        "gave no answer: the answer took longer than the total limit",
    ),
    case(
        "it does not stop",
        [b"HTTP/1.1 200 OK\r\n\r\n", [b"x" * 65_536] * 32],
        "gave no answer: the token endpoint does not stop to answer",
    ),
]


@pytest.mark.parametrize(("script", "said"), TOKEN_FAULTS)
def test_fault_of_a_token_endpoint_is_told_in_a_sentence(script: List[Any], said: str) -> None:
    with FakeUpstream(script) as fake:
        settings = settings_of()
        outside = shim.Outside(shim.token_post(settings, 0.3))
        client = shim.OAuthClient((f"{fake.url}/token",))
        with pytest.raises(shim.CredentialUnavailableError) as caught:
            shim.granted(outside, client, {"refresh_token": "hunter2"})
        assert fake.connections == 1
    assert caught.value.message == f"the token endpoint {fake.host} {said}"


EVERYTHING = {
    BUNDLE_FILE: LOGIN,
    CLAUDE_FILE: CLAUDE_LOGIN,
    f"{PROFILES}/configs/default.json": PROFILE,
    f"{PROFILES}/credentials/default.json": LOGIN,
    "key": "sk-ant-api03-f",
}
EVERY_VARIABLE = {
    "CLAUDE_CODE_OAUTH_TOKEN": SETUP_TOKEN,
    "ANTHROPIC_API_KEY": "sk-ant-api03-a",
    "ANTHROPIC_AUTH_TOKEN": "t",
    **FEDERATION_ENV,
}
IN_ORDER = "oauth-bundle setup-token api-key auth-token federation profile claude-code".split()


@pytest.mark.parametrize("first", range(len(IN_ORDER)))
def test_auto_takes_the_first_that_is_there_and_names_the_others_s1_b4(
    tmp_path: Path, first: int
) -> None:
    """D7; nobody's bill changes in silence."""
    laid(tmp_path, EVERYTHING)
    env = {"HOME": str(tmp_path), **EVERY_VARIABLE}
    gone = {
        "oauth-bundle": (tmp_path / BUNDLE_FILE).unlink,
        "setup-token": lambda: env.pop("CLAUDE_CODE_OAUTH_TOKEN"),
        "api-key": lambda: env.pop("ANTHROPIC_API_KEY"),
        "auth-token": lambda: env.pop("ANTHROPIC_AUTH_TOKEN"),
        "profile": (tmp_path / f"{PROFILES}/configs/default.json").unlink,
        "federation": lambda: env.pop("ANTHROPIC_FEDERATION_RULE_ID"),
    }
    for kind in IN_ORDER[:first]:
        gone[kind]()
    there = World()
    credential = shim.credential_from(settings_of(), env, there.outside)
    assert credential.describe().kind == IN_ORDER[first]
    others = [line for line in there.told if line.startswith("note: also found, not used: ")]
    assert len(others) == len(IN_ORDER) - 1 - first


def test_what_an_option_names_comes_before_what_was_lying_about(tmp_path: Path) -> None:
    laid(tmp_path, EVERYTHING)
    env = {"HOME": str(tmp_path), **EVERY_VARIABLE}
    settings = settings_of("--api-key-file", str(tmp_path / "key"))
    assert chosen(settings, env).authorization({}) == [("x-api-key", "sk-ant-api03-f")]


def test_credential_that_is_not_used_cannot_stop_the_start(tmp_path: Path) -> None:
    laid(tmp_path, {CLAUDE_FILE: "broken", f"{PROFILES}/configs/default.json": "broken"})
    env = {"HOME": str(tmp_path), "ANTHROPIC_API_KEY": "sk-ant-api03-a"}
    assert chosen(settings_of(), env).authorization({}) == [("x-api-key", "sk-ant-api03-a")]


@pytest.mark.parametrize("mode", [mode for mode in shim.AUTH_MODES if mode != "passthrough"])
def test_pinned_credential_that_is_not_there_is_told_with_how_to_give_it_s1_r12(
    tmp_path: Path, mode: str
) -> None:
    env = {"HOME": str(tmp_path), "ANTHROPIC_API_KEY": "k"} if mode != "api-key" else {}
    with pytest.raises(shim.ConfigError) as caught:
        chosen(settings_of("--auth", mode), env)
    assert str(caught.value).startswith(f"there is no {shim.KINDS[mode].name} to use; give it by ")


BAD_PROFILES = [
    case("no JSON", "x", "default.json: Expecting value"),
    case("a list", "[]", "default.json: expected an object"),
    case("another kind", '{"authentication": {"type": "x"}}', "neither user_oauth nor oidc"),
    case("plain http", PROFILE.replace("127.0.0.1:PORT", "h.example"), "must be https://"),
    case("no rule", FEDERATED.replace("fdrl_1", ""), "workload identity needs federation_rule_id"),
    case("no identity file", FEDERATED.replace('"file"', '"x"'), "identity token from no file"),
]


@pytest.mark.parametrize(("text", "said"), BAD_PROFILES)
def test_bad_profile_is_told(tmp_path: Path, text: str, said: str) -> None:
    laid(tmp_path, {f"{PROFILES}/configs/default.json": text})
    with pytest.raises(shim.ConfigError) as caught:
        chosen(settings_of(), {"HOME": str(tmp_path)})
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", ""])
def test_name_of_a_profile_does_not_climb(tmp_path: Path, name: str) -> None:
    env = {"HOME": str(tmp_path), "ANTHROPIC_PROFILE": name}
    with pytest.raises(shim.ConfigError):
        chosen(settings_of("--auth", "profile"), env)


def test_start_renews_a_login_by_itself_and_says_what_it_is(tmp_path: Path) -> None:
    laid(tmp_path, {BUNDLE_FILE: ENDED_LOGIN})
    env = {"HOME": str(tmp_path), "ANTHROPIC_API_KEY": "sk-ant-api03-lying-about"}
    log = io.StringIO()
    with FakeUpstream([GRANTED]) as fake:
        settings = settings_of("--port", "0", "--token-url", f"{fake.url}/token")
        with shim.server_from(settings, env, log) as server:
            server.app.start()
            assert fake.asked.acquire(timeout=PATIENCE)
            text = shim.welcome(server)
    login = json.loads((tmp_path / BUNDLE_FILE).read_text())
    assert (login["access_token"], login["refresh_token"]) == (
        "sk-ant-oat01-new",
        "sk-ant-ort01-r2",
    )
    assert log.getvalue() == (
        "note: also found, not used: API key from ANTHROPIC_API_KEY, billed to its Claude Console "
        f"organisation (--auth api-key takes it)\n{shim.CLAUDE_AI_NOTICE}\n"
    )
    assert (
        f"  credential  OAuth login from {tmp_path / BUNDLE_FILE}, drawn from its Claude "
        "subscription or billed as extra usage\n"
    ) in text


def test_new_settings_end_the_renewal_of_the_former_credential(tmp_path: Path) -> None:
    """A timer that was left over would fail this test."""
    laid(tmp_path, {BUNDLE_FILE: LOGIN})
    env, log = {"HOME": str(tmp_path)}, io.StringIO()
    with shim.server_from(settings_of("--port", "0"), env, log) as server:
        server.app.start()
        assert server.app.credential.describe().kind == "oauth-bundle"
        later = {**env, "ANTHROPIC_API_KEY": "sk-ant-api03-later"}
        settings = settings_of("--auth", "api-key", "--fallback-auth", "oauth-bundle")
        shim.reconfigure(server, settings, later)
        server.app.start()
        assert [payer.describe().kind for payer in server.app.payers()] == [
            "api-key",
            "oauth-bundle",
        ]
        server.app.log.write("sk-ant-api03-later sk-ant-oat01-b")
    assert log.getvalue().endswith("[secret] [secret]\n")


def test_new_settings_wait_for_a_login_that_is_not_on_the_disk(tmp_path: Path) -> None:
    """A new credential would read the spent token, and wait for the lock of the former one."""
    there, path = World(in_tokens("at-2", "rt-2")), login_file(tmp_path)
    there.full = True
    settings, env = settings_of("--port", "0"), {"ANTHROPIC_API_KEY": "k"}
    with shim.server_from(settings, env, io.StringIO()) as server:
        credential = server.app.credential = renewed_from(path, there)
        assert credential.authorization({}) == shown("at-2")
        with pytest.raises(shim.ConfigError, match="is not on the disk yet"):
            shim.reconfigure(server, settings, env)
        assert server.app.credential is credential
        there.full = False
        shim.reconfigure(server, settings, env)
        assert server.app.credential.describe().kind == "api-key"
    assert json.loads(Path(path).read_text())["refresh_token"] == "rt-2"


def test_fallback_that_is_used_anyway_is_refused(tmp_path: Path) -> None:
    settings = settings_of("--fallback-auth", "api-key", "--port", "0")
    env = {"HOME": str(tmp_path), "ANTHROPIC_API_KEY": "k"}
    with pytest.raises(shim.ConfigError) as caught:
        shim.server_from(settings, env, io.StringIO())
    assert str(caught.value) == "--fallback-auth: api-key is used anyway"


def test_fallback_does_not_pay_for_clients_that_should_bring_their_own_key() -> None:
    settings = settings_of("--auth", "passthrough", "--fallback-auth", "api-key", "--port", "0")
    with pytest.raises(shim.ConfigError) as caught:
        shim.server_from(settings, {"ANTHROPIC_API_KEY": "k"}, io.StringIO())
    assert str(caught.value) == (
        "--fallback-auth: with --auth passthrough you would pay for everybody"
    )


@ON_POSIX
def test_key_file_that_is_open_to_others_is_a_warning(tmp_path: Path) -> None:
    """Docker and Kubernetes mount secrets so."""
    path = secret_file(tmp_path / "key", "sk-ant-api03-f", 0o644)
    there = World()
    settings = settings_of("--api-key-file", path)
    credential = shim.credential_from(settings, {}, there.outside)
    assert credential.authorization({}) == [("x-api-key", "sk-ant-api03-f")]
    assert there.told == [f"warning: {path} can be read by others: run chmod 600 {path}"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        case(
            "plain http to another host",
            ["--token-url", "http://h.example/token"],
            "--token-url: a token endpoint must be https://",
        ),
        case(
            "an unknown mode",
            ["--auth", "static"],
            "--auth: expected one of auto, oauth-bundle, setup-token, api-key, auth-token, helper, "
            "federation, profile, claude-code, passthrough, got 'static'",
        ),
    ],
)
def test_bad_setting_of_credentials(argv: List[str], message: str) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        settings_of(*argv)
    assert str(caught.value) == message


def test_crash_dumps_no_core() -> None:
    pytest.importorskip("resource")
    code = (
        "import claude_shim, resource; claude_shim.no_core_dumps(); "
        "print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    ran = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={**os.environ, "PYTHONPATH": str(MODULE_FILE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "(0, 0)\n"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "a.example", "127.0.0.1.a"])
def test_other_machines_need_a_client_key(tmp_path: Path, host: str) -> None:
    """S2-F1, S4-B3: everybody on the network could spend the quota."""
    with pytest.raises(shim.ConfigError) as caught:
        shim.client_keys_from(settings_of("--host", host), {})
    assert str(caught.value) == (
        f"--host {host} lets other machines spend your quota: set CLAUDE_SHIM_API_KEY or "
        "--client-key-file first"
    )
    assert shim.client_keys_from(settings_of("--host", host), {"CLAUDE_SHIM_API_KEY": "k"})
    path = tmp_path / "keys"
    path.write_text("ann k1\n")
    settings = settings_of("--host", host, "--client-key-file", str(path))
    assert shim.client_keys_from(settings, {}).name_of({"x-api-key": "k1"}) == "ann"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_this_machine_needs_none(host: str) -> None:
    assert not shim.client_keys_from(settings_of("--host", host), {})


PLAIN_HTTP = [
    case("this machine", ["--base-url", "http://127.0.0.1:9"], True),
    case("this machine by name", ["--base-url", "http://localhost:9/p"], True),
    case("another host", ["--base-url", "http://10.0.0.1"], False),
    case("another host that sounds like this one", ["--base-url", "http://127.0.0.1.a"], False),
    case("another host, allowed", ["--base-url", "http://10.0.0.1", "--allow-plain-http"], True),
]


@pytest.mark.parametrize(("argv", "allowed"), PLAIN_HTTP)
def test_key_goes_over_plain_http_only_to_this_machine(argv: List[str], allowed: bool) -> None:
    if allowed:
        assert shim.upstream_from(settings_of(*argv)).url == argv[1]
        return
    with pytest.raises(shim.ConfigError) as caught:
        shim.upstream_from(settings_of(*argv))
    assert str(caught.value) == (
        "--base-url is http:// to another host, which shows the key; use https://"
    )


@pytest.mark.parametrize("read", [shim.read_text, shim.read_secret_file])
def test_path_that_none_is_told_in_a_sentence(read: Callable[[str], str]) -> None:
    with pytest.raises(shim.ConfigError, match=r"cannot read '/a\\x00b': .*embedded null"):
        read("/a\0b")


def test_key_without_certificate_does_not_serve_plain_http() -> None:
    with pytest.raises(shim.ConfigError, match="--tls-key needs --tls-cert"):
        shim.listener_context(settings_of("--tls-key", "key.pem"))


ANOTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg01bqTexcJ5c+wTQS
p57R2AwGzGREfN2AgF8v/dSaSg6hRANCAATZ6XdUlJ5b43FOLhIZd3WzEytVfxlf
MupHrrGIYZ47s0HS/qApzq2P8vodTWw4o52lF8R1R40qgXfQ2/foDLA2
-----END PRIVATE KEY-----
"""
LOCKED_KEY = """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,00112233445566778899AABBCCDDEEFF

AAAAAAAAAAAAAAAAAAAAAA==
-----END EC PRIVATE KEY-----
"""
BROKEN_CERT = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
TLS_FILES = {
    "cert": TEST_CERT,
    "key": ANOTHER_KEY,
    "locked": LOCKED_KEY,
    "broken": BROKEN_CERT,
    "text": "hunter2",
}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        case("no authorities", "--ca-file none", "--ca-file {}/none: No such file or directory"),
        case("text for authorities", "--ca-file text", "--ca-file {}/text: no usable certificate"),
        case("a broken one", "--ca-file broken", "--ca-file {}/broken: no usable certificate"),
        case(
            "no client certificate",
            "--client-cert none",
            "--client-cert {}/none: No such file or directory",
        ),
        case(
            "a client certificate without key",
            "--client-cert cert",
            "--client-cert {}/cert: no usable private key",
        ),
        case(
            "the file at fault of two",
            "--ca-file cert --client-cert text",
            "--client-cert {}/text: no usable certificate",
        ),
        case("no certificate", "--tls-cert none", "--tls-cert {}/none: No such file or directory"),
        case(
            "no certificate, but a key",
            "--tls-cert none --tls-key key",
            "--tls-cert {}/none: No such file or directory",
        ),
        case(
            "no key",
            "--tls-cert cert --tls-key none",
            "--tls-key {}/none: No such file or directory",
        ),
        case(
            "a certificate without key",
            "--tls-cert cert",
            "--tls-cert {}/cert: no usable private key",
        ),
        case(
            "a key for a certificate",
            "--tls-cert key --tls-key key",
            "--tls-cert {}/key: no usable certificate",
        ),
        case(
            "text for a key",
            "--tls-cert cert --tls-key text",
            "--tls-key {}/text: no usable private key",
        ),
        case(
            "another's key",
            "--tls-cert cert --tls-key key",
            "--tls-key {}/key: no usable private key (key values mismatch)",
        ),
        case(
            "a locked key",
            "--tls-cert cert --tls-key locked",
            "--tls-key {}/locked: the key is encrypted",
        ),
    ],
)
def test_file_of_tls_that_is_no_use_is_named_with_its_option(
    options: str, told: str, tmp_path: Path
) -> None:
    for name, text in TLS_FILES.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    words = [f"{tmp_path}/{w}" if w[:2] != "--" else w for w in options.split()]
    settings = settings_of(*words)
    with pytest.raises(shim.ConfigError) as caught:
        (shim.tls_context(settings, "https://a.example"), shim.listener_context(settings))
    said = str(caught.value).replace(" (no certificate or crl found)", "")  # OpenSSL 3 says more
    assert said == told.format(tmp_path)


@ON_POSIX
def test_path_that_is_taken_is_told_in_a_sentence(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("no socket")
    for path, reason in (
        (taken, f"{taken} is taken by another program; choose another --unix"),
        (tmp_path / ("x" * 200), "cannot listen on .*: AF_UNIX path too long"),
    ):
        settings = settings_of("--upstream", "echo", "--unix", str(path))
        with pytest.raises(shim.ConfigError, match=reason):
            shim.server_from(settings, {}, io.StringIO())


def test_port_that_is_taken_is_told_in_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(shim.ConfigError) as caught:
            shim.server_from(settings_of("--upstream", "echo", "--port", port), {}, io.StringIO())
    assert str(caught.value) == (
        f"127.0.0.1:{port} is taken by another program; choose another --port"
    )


def test_host_that_is_not_ours_is_told_in_a_sentence() -> None:
    settings = settings_of("--upstream", "echo", "--port", "0", "--host", "192.0.2.1")
    with pytest.raises(shim.ConfigError) as caught:
        shim.server_from(settings, {"CLAUDE_SHIM_API_KEY": "k"}, io.StringIO())
    assert str(caught.value).startswith("cannot listen on 192.0.2.1:0: ")


def test_server_is_made_of_the_settings() -> None:
    log = io.StringIO()
    settings = settings_of(
        *("--upstream", "echo", "--port", "0", "--strict", "--retries", "5", "--opus", "claude-x"),
        *("--alias", "gpt*=opus", "--prompt-cache", "off", "--max-body", "1K"),
    )
    with shim.server_from(settings, {"CLAUDE_SHIM_API_KEY": "key-of-env"}, log) as server:
        policy = server.app.policy
        assert policy.aliases == {"gpt*": "opus", "opus": "claude-x"}
        assert (policy.strict, policy.prompt_cache, policy.retries.retries) == (True, "off", 5)
        assert policy.client_keys.name_of({"x-api-key": "key-of-env"}) == "env"
        assert server.limits.max_body == 1024
        server.app.log.write("is key-of-env masked?")
        text = shim.welcome(server)
    assert log.getvalue() == "is [secret] masked?\n"
    assert text.split("\n")[1:4] == [
        "  upstream    echo",
        "  credential  none, nothing is billed",
        "  callers     only with a client key",
    ]
    assert f"OPENAI_BASE_URL={server.url}/v1" in text
    assert "key-of-env" not in text


def test_check_config_shows_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, key, keys = (tmp_path / name for name in ("config.ini", "key", "keys"))
    config.write_text("[claude_shim]\nupstream-header = X-Team: secret-header\n")
    key.write_text("secret-key")
    keys.write_text("ann secret-client")
    argv = ["--config", str(config), "--api-key-file", str(key), "--client-key-file", str(keys)]
    assert shim.main([*argv, "--check-config"]) == 0
    out, err = capsys.readouterr()
    assert "upstream-header = ('X-Team',)\n" in out
    assert f"credential = API key from {key}" in out
    assert "secret" not in out + err


def test_check_config_finds_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.ini"
    config.write_text("[claude_shim]\nupstream = echo\nprot = 1\n")
    assert shim.main(["--config", str(config), "--check-config"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "claude_shim: the configuration file has an unknown setting: prot\n",
    )


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        shim.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert [option.flag for option in shim.OPTIONS if f"--{option.flag}" not in shown] == []


def test_option_is_not_guessed_from_its_beginning() -> None:
    with pytest.raises(SystemExit) as caught:
        settings_of("--por", "1")
    assert caught.value.code == 2


NOT_HERE = (
    "; keys are not given here, where other users could read them: set ANTHROPIC_API_KEY for "
    "upstream or CLAUDE_SHIM_API_KEY for clients, or see --api-key-file and --client-key-file"
)

NO_WORD = "a word that is neither an option nor a command"


def said_of_wrong_words(words: List[str], capsys: pytest.CaptureFixture[str]) -> Tuple[str, str]:
    """What the program writes to its output, and to its errors, before it ends by 2."""
    with pytest.raises(SystemExit) as caught:
        shim.main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    return out, err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        case("upstream's key", ["--api-key", "sk-ant-hunter2"], f"no option --api-key{NOT_HERE}"),
        case("joined", ["--api-key=sk-ant-hunter2"], f"no option --api-key{NOT_HERE}"),
        case("the clients' key", ["--client-key", "hunter2"], f"no option --client-key{NOT_HERE}"),
        case("joined, too", ["--client-key=hunter2"], f"no option --client-key{NOT_HERE}"),
        case("another spelling", ["--API_KEY=hunter2"], f"no option --API_KEY{NOT_HERE}"),
        case(
            "after a command",
            ["doctor", "--auth-token", "hunter2"],
            f"no option --auth-token{NOT_HERE}",
        ),
        case("a key alone", ["sk-ant-hunter2"], f"{NO_WORD}{NOT_HERE}"),
        case("a key as an option", ["--sk-ant-hunter2"], f"{NO_WORD}{NOT_HERE}"),
        case("a short option", ["-khunter2"], NO_WORD),
        case("two", ["--prot=1", "--quite", "--port", "1"], "no option --prot, --quite"),
        case("a word that is no command", ["srve"], NO_WORD),
    ],
)
def test_wrong_word_on_the_command_line_is_not_repeated_as_it_may_be_a_key(
    words: List[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said_of_wrong_words(words, capsys)
    assert err.splitlines()[-1].partition(": error: there is ")[2] == told
    assert "hunter2" not in out + err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        case("for a switch", ["--check-config=hunter2"], "argument --check-config: ignored"),
        case("for a flag", ["--quiet=hun'ter2"], "argument --quiet: ignored"),
    ],
)
def test_value_of_what_takes_none_is_not_repeated_as_it_may_be_a_key(
    words: List[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said_of_wrong_words(words, capsys)
    assert err.splitlines()[-1] == f"claude_shim: error: {told} explicit argument"
    assert not re.search("hun'?ter2", out + err)


def test_key_behind_a_letter_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):  # some Pythons take the letter for a switch and show the help
        shim.main(["-hunter2"])
    out, err = capsys.readouterr()
    assert "hunter2" not in out + err


@pytest.mark.parametrize(
    ("argv", "env", "file", "source"),
    [
        case("on the command line", ["--api-key-file", "sk-ant-hunter2"], {}, {}, "--api-key-file"),
        case("for another option", ["--auth", "sk-ant-hunter2"], {}, {}, "--auth"),
        case(
            "in the environment",
            [],
            {"CLAUDE_SHIM_CLIENT_KEY_FILE": "sk-hunter2"},
            {},
            "environment variable CLAUDE_SHIM_CLIENT_KEY_FILE",
        ),
        case(
            "in the configuration file",
            [],
            {},
            {"bundle": "sk-ant-hunter2"},
            "configuration file, bundle",
        ),
    ],
)
def test_key_in_place_of_a_setting_is_not_repeated(
    argv: List[str], env: Dict[str, str], file: Dict[str, str], source: str
) -> None:
    with pytest.raises(shim.ConfigError) as caught:
        settings_of(*argv, env=env, file=file)
    assert str(caught.value) == f"{source}: this is a key; put it into a file and name that"


# --- login


def called_back(listener: shim.CallbackListener, *requests: bytes) -> List[socket.socket]:
    """Connections of a browser, each with its bytes sent; the listener need not run yet."""
    port = int(listener.redirect_uri.split(":")[2].partition("/")[0])
    return [browser_connection(port, request) for request in requests]


def browser_connection(port: int, request: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.sendall(request.replace(b"PORT", str(port).encode()))
    return sock


def page(sock: socket.socket) -> bytes:
    """What the browser got, to the end of the connection."""
    with sock, sock.makefile("rb") as stream:
        return stream.read()


CALLBACK = b"GET /callback?code=c-1&state=state-of-ours HTTP/1.1\r\nHost: localhost:PORT\r\n\r\n"

WRONG_HITS = [
    case("a wrong state", CALLBACK.replace(b"ours", b"others")),
    case("another path", CALLBACK.replace(b"/callback", b"/favicon.ico")),
    case("another method", CALLBACK.replace(b"GET", b"POST")),
    case("a foreign host (DNS rebinding)", CALLBACK.replace(b"localhost", b"evil.example")),
    case("another port of this host", CALLBACK.replace(b"PORT", b"80")),
    case("no host", CALLBACK.replace(b"Host: localhost:PORT\r\n", b"")),
    case("no HTTP", b"\x16\x03\x01\r\n\r\n"),
    case("a head without end", b"GET /callback HTTP/1.1\r\nX: " + b"x" * (17 << 10)),
]


@pytest.mark.parametrize("request_", WRONG_HITS)
def test_wrong_hit_is_a_400_and_the_login_goes_on(request_: bytes) -> None:
    """mozilla cq#348: any page could abort the login."""
    with shim.CallbackListener() as listener:
        wrong, right = called_back(listener, request_, CALLBACK)
        assert listener.code(ATTEMPT, PATIENCE) == "c-1"
        assert page(right).startswith(b"HTTP/1.1 200 ")
    got = page(wrong)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b"evil" not in got
    assert b"others" not in got


def test_page_of_a_login_shows_and_keeps_nothing() -> None:
    with shim.CallbackListener() as listener:
        (sock,) = called_back(listener, CALLBACK)
        listener.code(ATTEMPT, PATIENCE)
    head, _, body = page(sock).partition(b"\r\n\r\n")
    assert body == (
        b"<!doctype html><html lang=en><meta charset=utf-8><title>claude_shim</title>"
        b"<p>claude_shim has its answer. You can close this page.</p>\n"
    )
    for line in (b"cache-control: no-store", b"referrer-policy: no-referrer"):
        assert line in head.split(b"\r\n")


def test_login_is_over_after_one_answer() -> None:
    with shim.CallbackListener() as listener:
        (first,) = called_back(listener, CALLBACK)
        assert listener.code(ATTEMPT, PATIENCE) == "c-1"
    first.close()
    with pytest.raises(ConnectionRefusedError):
        called_back(listener, CALLBACK)


def test_denied_login_ends_the_wait() -> None:
    with shim.CallbackListener() as listener:
        (sock,) = called_back(listener, CALLBACK.replace(b"code=c-1", b"error=access_denied"))
        with pytest.raises(shim.LoginError, match="access_denied"):
            listener.code(ATTEMPT, PATIENCE)
    assert page(sock).startswith(b"HTTP/1.1 403 ")


def test_login_is_listened_for_on_this_machine_only() -> None:
    """pi#7515: a variable of the environment moved it to all addresses."""
    with shim.CallbackListener() as listener:
        port = int(listener.redirect_uri.split(":")[2].partition("/")[0])
        if sys.platform == "linux":  # where all of 127.0.0.0/8 is this machine
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), PATIENCE)


def test_silent_connections_hold_up_no_login() -> None:
    with shim.CallbackListener() as listener:
        silent = called_back(listener, *[b"GET /callb"] * 40)
        (right,) = called_back(listener, CALLBACK)
        assert listener.code(ATTEMPT, PATIENCE) == "c-1"
        right.close()
    for sock in silent:
        sock.close()


def test_callback_in_pieces_is_waited_for() -> None:
    with shim.CallbackListener() as listener:
        (sock,) = called_back(listener, CALLBACK[:20])
        with pytest.raises(shim.LoginError):
            listener.code(ATTEMPT, 0.05)
        port = listener.redirect_uri.split(":")[2].partition("/")[0].encode()
        sock.sendall(CALLBACK[20:].replace(b"PORT", port))
        assert listener.code(ATTEMPT, PATIENCE) == "c-1"
        sock.close()


def test_login_that_nobody_answers_ends() -> None:
    with shim.CallbackListener() as listener, pytest.raises(shim.LoginError) as caught:
        listener.code(ATTEMPT, 0.01)
    assert str(caught.value) == "the browser did not come back in time; run login again"


class ScriptedUser(shim.Terminal):
    """Answers what it is asked, in order; with a browser it opens what it is told to open."""

    patience = PATIENCE

    def __init__(self, *answers: str, browser: Optional[Callable[[str], None]] = None) -> None:
        self._answers = list(answers)
        self._browser = browser
        self.said: List[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def ask(self, question: str) -> str:
        self.said.append(question)
        return self._answers.pop(0).replace("STATE", self.fields()["state"])

    def browse(self, url: str) -> bool:
        if self._browser is not None:
            self.said.append(url)
            self._browser(url)
        return self._browser is not None

    def fields(self) -> Dict[str, str]:
        """What the page to agree on is asked, {} before there is one."""
        pages = [line for text in self.said for line in text.split("\n") if "://claude.com" in line]
        query = urllib.parse.urlsplit(pages[-1]).query if pages else "state="
        return dict(urllib.parse.parse_qsl(query, keep_blank_values=True))


class Browser:
    """Sends its user's answer to the place that the page named; `pages` are what it got back."""

    def __init__(self, *queries: str) -> None:
        self._queries = queries
        self._sockets: List[socket.socket] = []

    def __call__(self, url: str) -> None:
        fields = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
        port = urllib.parse.urlsplit(fields["redirect_uri"]).port
        assert port is not None
        for query in self._queries:
            target = f"/callback?{query.replace('STATE', fields['state'])}"
            request = f"GET {target} HTTP/1.1\r\nHost: localhost:PORT\r\n\r\n"
            self._sockets.append(browser_connection(port, request.encode()))

    def statuses(self) -> List[bytes]:
        """The status of each answer; a connection that was cut has none."""
        found = []
        for sock in self._sockets:
            with contextlib.suppress(ConnectionError):
                found.append(page(sock)[9:12])
        return [status for status in found if status]


def command_call(user: ScriptedUser, *argv: str, env: Optional[Dict[str, str]] = None) -> shim.Call:
    """The call of a command; the switches are those of all commands."""
    known = {f"--{switch}" for command in shim.COMMANDS.values() for switch in command.switches}
    switches = frozenset(word[2:] for word in argv if word in known)
    settings = settings_of(*[word for word in argv if word not in known], env=env)
    return shim.Call(settings, env or {}, switches, user, run=run_of(44, ""))  # no keychain


def posted(fake: FakeUpstream) -> JSON:
    """The one body that the token endpoint got."""
    (request,) = fake.requests
    return json.loads(request.partition(b"\r\n\r\n")[2])


def challenge_of(verifier: str) -> str:
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


RIGHT = "code=c-1&state=STATE"

LOGINS = [
    case("in the browser", ["--yes"], [], Browser(RIGHT), [b"200"]),
    case("in the browser, asked before", [], ["y"], Browser(RIGHT), [b"200"]),
    case(
        "in the browser, called back a second time",
        ["--yes"],
        [],
        Browser(RIGHT, "code=c-2&state=STATE"),
        [b"200"],
    ),
    case(
        "in the browser, after a page that guessed",
        ["--yes"],
        [],
        Browser("code=c-2&state=guess", "error=access_denied", RIGHT),
        [b"400", b"400", b"200"],
    ),
    case("by a pasted line", ["--yes", "--no-browser"], ["c-1#STATE\n"], Browser(), []),
    case("by a pasted line, for want of a browser", [], ["yes", "c-1#STATE"], None, []),
]


@pytest.mark.parametrize(("argv", "answers", "browser", "pages"), LOGINS)
def test_login(
    tmp_path: Path, argv: List[str], answers: List[str], browser: Any, pages: List[bytes]
) -> None:
    path = tmp_path / "state" / "oauth.json"
    user = ScriptedUser(*answers, browser=browser)
    with FakeUpstream([GRANTED]) as fake:
        given = ["--bundle", str(path), "--token-url", f"{fake.url}/v1/oauth/token"]
        code = shim.login(command_call(user, *argv, *given))
        fields, body = user.fields(), posted(fake)
    assert code == 0
    assert fields["code_challenge"] == challenge_of(body["code_verifier"])
    assert len(body["code_verifier"]) == len(body["state"]) == 43  # 256 bits
    assert {k: v for k, v in body.items() if k not in ("code_verifier", "state")} == {
        "grant_type": "authorization_code",
        "code": "c-1",
        "redirect_uri": fields["redirect_uri"],
        "client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
    }
    bundle = shim.parsed_bundle(shim.read_secret_file(str(path)), "the file")
    assert bundle[:2] == ("sk-ant-oat01-new", "sk-ant-ort01-r2")
    if os.name == "posix":
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    told = "\n".join(user.said)
    assert "Anthropic's terms reserve the tokens of Claude accounts" in user.said[0]
    assert [s for s in ("c-1", "sk-ant-", body["code_verifier"]) if s in told] == []
    assert (browser.statuses() if browser else []) == pages


def test_page_to_agree_on() -> None:
    user = ScriptedUser("")
    shim.login(command_call(user, "--yes", "--no-browser"))
    fields = user.fields()
    assert (len(fields.pop("state")), len(fields.pop("code_challenge"))) == (43, 43)
    assert fields == {
        "code": "true",
        "client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        "response_type": "code",
        "redirect_uri": "https://platform.claude.com/oauth/code/callback",
        "scope": "user:profile user:inference",
        "code_challenge_method": "S256",
    }


class SlowUser(ScriptedUser):
    """Never comes back from the browser."""

    patience = 0.01


NO_LOGINS = [
    case("not wanted", [], ScriptedUser("n"), "Nothing was done. (--yes goes on without asking.)"),
    case("nobody there", [], ScriptedUser(""), "Nothing was done. (--yes goes on without asking.)"),
    case(
        "denied",
        ["--yes"],
        ScriptedUser(browser=Browser("error=access_denied&state=STATE")),
        "Not logged in: the login was not granted (access_denied).",
    ),
    case(
        "the browser did not come back",
        ["--yes"],
        SlowUser(browser=Browser("code=c-1&state=guess")),
        "Not logged in: the browser did not come back in time; run login again.",
    ),
    case(
        "a pasted line of another login",
        ["--yes", "--no-browser"],
        ScriptedUser("c-1#other"),
        "Not logged in: that is not the whole line CODE#STATE of this login; run login again.",
    ),
    case(
        "half a pasted line",
        ["--yes", "--no-browser"],
        ScriptedUser("c-1"),
        "Not logged in: that is not the whole line CODE#STATE of this login; run login again.",
    ),
]


@pytest.mark.parametrize(("argv", "user", "told"), NO_LOGINS)
def test_login_that_fails_asks_for_no_tokens(
    tmp_path: Path, argv: List[str], user: ScriptedUser, told: str
) -> None:
    path = tmp_path / "oauth.json"
    with FakeUpstream([GRANTED]) as fake:
        given = ["--bundle", str(path), "--token-url", f"{fake.url}/v1/oauth/token"]
        assert shim.login(command_call(user, *argv, *given)) == 1
        assert fake.requests == []
    assert user.said[-1] == told
    assert not path.exists()
    if isinstance(user._browser, Browser):
        user._browser.statuses()


def test_login_whose_code_is_refused_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "oauth.json"
    path.write_text("the old one")
    user = ScriptedUser("c-1#STATE")
    with FakeUpstream([json_bytes({"error": "invalid_grant"}, "400 Bad")]) as fake:
        given = ["--bundle", str(path), "--token-url", f"{fake.url}/v1/oauth/token"]
        assert shim.login(command_call(user, "--yes", "--no-browser", *given)) == 1
    assert user.said[-1].startswith("Not logged in: ")
    assert path.read_text() == "the old one"


def test_login_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "oauth.json"
    user = ScriptedUser("c-1#STATE")
    with FakeUpstream([GRANTED]) as fake:
        given = ["--bundle", str(path), "--token-url", f"{fake.url}/v1/oauth/token"]
        assert shim.login(command_call(user, "--yes", "--no-browser", *given)) == 1
    assert user.said[-1].startswith(f"Not logged in: cannot write {path}: ")


SCREENS = [
    case("a desktop", {"DISPLAY": ":0"}, "linux", True),
    case("a desktop with Wayland", {"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
    case("a console", {}, "linux", False),
    case("a Mac", {}, "darwin", True),
    case("Windows", {}, "win32", True),
    case("a Mac over SSH", {"SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}, "darwin", False),
    case("a forwarded display", {"SSH_CONNECTION": "1", "DISPLAY": ":10"}, "linux", False),
]


@pytest.mark.parametrize(("env", "platform", "expected"), SCREENS)
def test_browser_is_opened_where_its_user_sits(env: Any, platform: str, expected: bool) -> None:
    assert shim.has_screen(env, platform) is expected


BUNDLE = '{"access_token": "sk-ant-oat01-a", "refresh_token": "sk-ant-ort01-r"}'

LOGOUTS = [
    case("revoked", BUNDLE, "200 OK", 0, ("sk-ant-ort01-r", "refresh_token")),
    case(
        "revoked without a refresh token",
        '{"access_token": "sk-ant-oat01-a"}',
        "200 OK",
        0,
        ("sk-ant-oat01-a", "access_token"),
    ),
    case("not revoked", BUNDLE, "500 Oh", 1, ("sk-ant-ort01-r", "refresh_token")),
]


@pytest.mark.parametrize(("text", "status", "code", "token"), LOGOUTS)
def test_logout(tmp_path: Path, text: str, status: str, code: int, token: Any) -> None:
    path, user = tmp_path / "oauth.json", ScriptedUser()
    shim.write_secret_file(str(path), text)
    with FakeUpstream([json_bytes({}, status)]) as fake:
        given = ["--bundle", str(path), "--token-url", f"{fake.url}/v1/oauth/token"]
        assert shim.logout(command_call(user, *given)) == code
        assert fake.requests[0].startswith(b"POST /v1/oauth/token/revoke HTTP/1.1\r\n")
        assert posted(fake) == {
            "token": token[0],
            "token_type_hint": token[1],
            "client_id": "9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        }
    assert not path.exists()
    if os.name == "posix":  # it was locked against those that renew it
        assert path.with_name("oauth.json.lock").exists()
    assert user.said[0] == f"Deleted {path}."
    assert ("The tokens were not revoked" in "".join(user.said)) is bool(code)
    assert "sk-ant" not in "".join(user.said)


def test_logout_without_a_network_deletes_all_the_same(tmp_path: Path) -> None:
    path, user = tmp_path / "oauth.json", ScriptedUser()
    shim.write_secret_file(str(path), BUNDLE)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1/oauth/token"
        call = command_call(user, "--bundle", str(path), "--token-url", url)
        assert shim.logout(call) == 1
    assert not path.exists()
    assert "The tokens were not revoked: cannot reach upstream" in user.said[1]


def test_logout_takes_along_what_a_killed_renewal_left(tmp_path: Path) -> None:
    path, user = tmp_path / "oauth.json", ScriptedUser()
    for name, token in (("oauth.json", "old"), ("oauth.json.new", "new")):
        text = json.dumps({"access_token": "a", "refresh_token": token})
        shim.write_secret_file(str(tmp_path / name), text)
    with FakeUpstream([json_bytes({}, "200 OK")]) as fake:
        given = ["--bundle", str(path), "--token-url", f"{fake.url}/v1/oauth/token"]
        assert shim.logout(command_call(user, *given)) == 0
        assert posted(fake)["token"] == "new"
    assert not path.exists()
    assert not path.with_name("oauth.json.new").exists()


@pytest.mark.skipif(os.name != "posix", reason="O_NOFOLLOW is of POSIX")
def test_logout_that_gets_no_lock_says_so(tmp_path: Path) -> None:
    path = tmp_path / "oauth.json"
    shim.write_secret_file(str(path), BUNDLE)
    os.symlink("elsewhere", f"{path}.lock")
    with pytest.raises(shim.ConfigError, match="could not be deleted: cannot open"):
        shim.logout(command_call(ScriptedUser(), "--bundle", str(path)))
    assert path.exists()


def test_logout_without_a_login_is_none(tmp_path: Path) -> None:
    path, user = tmp_path / "oauth.json", ScriptedUser()
    assert shim.logout(command_call(user, "--bundle", str(path))) == 0
    assert user.said == [f"There is no login in {path}."]


def test_logout_deletes_nothing_that_is_no_login(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    shim.write_secret_file(str(path), "Chapter 1")
    with pytest.raises(shim.ConfigError):
        shim.logout(command_call(ScriptedUser(), "--bundle", str(path)))
    assert path.read_text() == "Chapter 1"


# --- status and doctor

LONG_KEY = "sk-ant-api03-" + "k" * 40 + "WXYZ"
LONG_TOKEN = "sk-ant-oat01-" + "t" * 90 + "TUVW"
LOGIN_IN_2_HOURS = {
    "access_token": LONG_TOKEN,
    "refresh_token": "sk-ant-ort01-" + "r" * 90,
    "expires_at": NOW + 7260,
}
LOGIN_ENDED = {"access_token": LONG_TOKEN, "expires_at": NOW - 86400 * 3}
CLAUDE_CODE_ENDED = {"claudeAiOauth": {"accessToken": LONG_TOKEN, "expiresAt": 1000 * (NOW - 90)}}

A_LOGIN = {"state/claude-shim/oauth.json": LOGIN_IN_2_HOURS}
AN_ENDED_LOGIN = {"state/claude-shim/oauth.json": LOGIN_ENDED}
CLAUDE_CODE = {".claude/.credentials.json": CLAUDE_CODE_ENDED}
CLAUDE_CODE_NOW = {".claude/.credentials.json": {"claudeAiOauth": {"accessToken": LONG_TOKEN}}}
OTHER_TOKEN = "sk-ant-oat01-" + "h" * 90 + "HIJK"
CLAUDE_CODE_OF_ANOTHER = {
    ".claude/.credentials.json": {"claudeAiOauth": {"accessToken": OTHER_TOKEN}}
}
A_KEY = {"ANTHROPIC_API_KEY": LONG_KEY}


def call_at_home(
    tmp_path: Path, files: Dict[str, Any], env: Dict[str, str], *argv: str
) -> Tuple[shim.Call, ScriptedUser]:
    """A command's call in a home folder with these JSON files and no others, at NOW."""
    for name, value in files.items():
        shim.write_secret_file(str(tmp_path / name), json.dumps(value))
    state = str(tmp_path / "state")
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": state, "LOCALAPPDATA": state}
    user = ScriptedUser()
    call = command_call(user, *argv, env={**home, "USERPROFILE": str(tmp_path), **env})
    return call._replace(clock=lambda: NOW), user


STATUSES = [
    case(
        "an API key",
        ({}, A_KEY, []),
        0,
        """\
API key: used, as the first there is
  from     ANTHROPIC_API_KEY
  token    sk-ant-api03-...WXYZ
  payer    billed to its Claude Console organisation""",
    ),
    case(
        "a login and an API key, which S1-B4 chose between in silence",
        (A_LOGIN, A_KEY, []),
        0,
        """\
OAuth login: used, as the first there is
  from     HOME/state/claude-shim/oauth.json
  token    sk-ant-oat01-...TUVW
  expires  in 2 hours, renewed by itself
  payer    drawn from its Claude subscription or billed as extra usage

API key: unused, OAuth login comes first; --auth api-key takes this
  from     ANTHROPIC_API_KEY
  token    sk-ant-api03-...WXYZ
  payer    billed to its Claude Console organisation""",
    ),
    case(
        "an API key that was asked for, and a login to fall back to",
        (A_LOGIN, A_KEY, ["--auth", "api-key", "--fallback-auth", "oauth-bundle"]),
        0,
        """\
OAuth login: fallback, for what upstream refuses to the first
  from     HOME/state/claude-shim/oauth.json
  token    sk-ant-oat01-...TUVW
  expires  in 2 hours, renewed by itself
  payer    drawn from its Claude subscription or billed as extra usage

API key: used, as it was asked for
  from     ANTHROPIC_API_KEY
  token    sk-ant-api03-...WXYZ
  payer    billed to its Claude Console organisation""",
    ),
    case(
        "a login that ended and cannot be renewed",
        (AN_ENDED_LOGIN, {}, []),
        3,
        """\
OAuth login: used, as the first there is
  from     HOME/state/claude-shim/oauth.json
  token    sk-ant-oat01-...TUVW
  expires  3 days ago
  payer    drawn from its Claude subscription or billed as extra usage
  expired  renew it by `claude_shim login`, or `--bundle`""",
    ),
    case(
        "two logins",
        ({**A_LOGIN, **CLAUDE_CODE_OF_ANOTHER}, {}, []),
        0,
        """\
OAuth login: used, as the first there is
  from     HOME/state/claude-shim/oauth.json
  token    sk-ant-oat01-...TUVW
  expires  in 2 hours, renewed by itself
  payer    drawn from its Claude subscription or billed as extra usage

login of Claude Code: unused, OAuth login comes first; --auth claude-code takes this
  from     HOME/.claude/.credentials.json
  token    sk-ant-oat01-...HIJK
  payer    drawn from its Claude subscription or billed as extra usage""",
    ),
    case(
        "a setup token that is cut off (S1-R24)",
        ({}, {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-short"}, []),
        1,
        """\
setup token: used, as the first there is
  from     CLAUDE_CODE_OAUTH_TOKEN
  broken   the setup token from CLAUDE_CODE_OAUTH_TOKEN has 18 characters of at least 80: \
is it cut off? (--allow-odd-token takes it all the same)""",
    ),
    case(
        "a command that prints a key, which is not run",
        ({}, {}, ["--key-helper", "touch /tmp/no; exit 1"]),
        0,
        """\
key: used, as it was asked for
  from     --key-helper
  expires  not known before it is asked for
  payer    billed to whoever the key is of""",
    ),
    case(
        "the keys of clients",
        ({}, A_KEY, ["--auth", "passthrough"]),
        0,
        """\
each client's own key: used, as it was asked for
  payer    billed to each client

API key: unused, each client's own key was asked for; --auth api-key takes this
  from     ANTHROPIC_API_KEY
  token    sk-ant-api03-...WXYZ
  payer    billed to its Claude Console organisation""",
    ),
    case(
        "the echo",
        ({}, {}, ["--upstream", "echo"]),
        0,
        "none: used, as it was asked for\n  payer    nothing is billed",
    ),
    case("nothing", ({}, {}, []), 1, shim.NO_CREDENTIAL),
    case(
        "nothing of what was asked for",
        ({}, {}, ["--auth", "api-key"]),
        1,
        "there is no API key to use; give it by `ANTHROPIC_API_KEY`, `--api-key-file`",
    ),
]


@pytest.mark.parametrize(("given", "code", "text"), STATUSES)
def test_status(tmp_path: Path, given: Any, code: int, text: str) -> None:
    files, env, argv = given
    call, user = call_at_home(tmp_path, files, env, *argv)
    assert shim.status(call) == code
    assert user.said == [text.replace("HOME", str(tmp_path))]


def test_status_of_claude_codes_login_that_ended(tmp_path: Path) -> None:
    call, user = call_at_home(tmp_path, CLAUDE_CODE, {}, "--json")
    assert shim.status(call) == 3
    assert json.loads(user.said[0]) == [
        {
            "kind": "claude-code",
            "source": str(tmp_path / ".claude" / ".credentials.json"),
            "use": "used",
            "because": "as the first there is",
            "state": "expired",
            "fault": "renew it by `claude`, then `/login`",
            "notes": [],
            "token": "sk-ant-oat01-...TUVW",
            "expires_at": NOW - 90,
            "expires": "1 minute ago",
            "payer": "drawn from its Claude subscription or billed as extra usage",
        }
    ]


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        case("a long key", LONG_KEY, "sk-ant-api03-...WXYZ"),
        case("a short key", "sk-ant-api03-abcdef", "sk-ant-api03-..."),
        case("a key of another gateway", "g" * 36 + "ABCD", "...ABCD"),
        case("a password", "hunter2", "..."),
    ],
)
def test_masked_secret(secret: str, shown: str) -> None:
    assert shim.masked(secret) == shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "less than a minute"), (60, "1 minute"), (7199, "1 hour"), (172800, "2 days")],
)
def test_span_in_words(seconds: float, words: str) -> None:
    assert shim.span(seconds) == words


MODELS_HEAD = (
    b"HTTP/1.1 %d X\r\nDate: Sat, 21 Nov 2026 22:26:40 GMT\r\nContent-Length: %d\r\n\r\n%b"
)


def models_answer(status: int, message: str = "") -> List[bytes]:
    """A script of FakeUpstream: its answer to the question for a model, at NOW."""
    body = json.dumps({"type": "error", "error": {"type": "x", "message": message}}).encode()
    return [MODELS_HEAD % (status, len(body), body)]


DOCTORS = [
    case(
        "all is well",
        ({}, A_KEY, []),
        models_answer(200),
        0,
        [
            "ok credential API key from ANTHROPIC_API_KEY, billed to its Claude Console",
            "ok upstream URL takes the credential",
            "ok clock this clock agrees with upstream's",
            "ok callers any program on this machine",
        ],
    ),
    case(
        "two credentials (S1-R24)",
        (A_LOGIN, A_KEY, []),
        models_answer(200),
        0,
        [
            "note others API key from ANTHROPIC_API_KEY, billed",
            "organisation: unused, OAuth login comes first; --auth api-key takes this",
        ],
    ),
    case(
        "a setup token that is cut off (S1-R24)",
        ({}, {"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-short"}, []),
        models_answer(401, "x-api-key header is required"),
        1,
        [
            "fault credential the setup token from CLAUDE_CODE_OAUTH_TOKEN has 18 characters",
            "ok upstream URL answers; the credential was not tried",
        ],
    ),
    case(
        "Claude Code's login for want of another, which ended (S1-R24)",
        (CLAUDE_CODE, {}, []),
        models_answer(401, "x-api-key header is required"),
        1,
        [
            "fault credential the login of Claude Code has ended: run `claude`, which renews it",
            "note credential nothing else was found; if that was not meant, give an API key",
        ],
    ),
    case(
        "Claude Code's login, refused by upstream",
        (CLAUDE_CODE_NOW, {}, []),
        models_answer(401, "invalid bearer token"),
        1,
        ["fault upstream the login of Claude Code has ended: run `claude`, which renews it"],
    ),
    case(
        "no credential",
        ({}, {}, []),
        models_answer(401),
        1,
        [
            "fault credential " + shim.NO_CREDENTIAL,
        ],
    ),
    case(
        "a key that is refused, shown by upstream",
        ({}, A_KEY, []),
        models_answer(403, f"not for {LONG_KEY}\x1b[31m"),
        1,
        [
            "fault upstream URL answers with status 403: not for [secret] [31m",
        ],
    ),
    case(
        "a gateway without a list of models",
        ({}, A_KEY, []),
        models_answer(404),
        0,
        [
            "ok upstream URL answers; the credential was not tried",
        ],
    ),
    case(
        "the keys of clients",
        ({}, {}, ["--auth", "passthrough"]),
        models_answer(401),
        0,
        [
            "ok credential each client's own key, billed to each client",
            "ok upstream URL answers; the credential was not tried",
        ],
    ),
    case(
        "the echo",
        ({}, {}, ["--upstream", "echo"]),
        models_answer(500),
        0,
        ["ok credential none, nothing is billed", "ok upstream echo takes the credential"],
    ),
    case(
        "a fallback that is not there",
        ({}, A_KEY, ["--fallback-auth", "setup-token"]),
        models_answer(401),
        1,
        ["fault credential there is no setup token to use; give it by `CLAUDE_CODE_OAUTH_TOKEN`"],
    ),
    case(
        "an open host without a key",
        ({}, A_KEY, ["--host", "0.0.0.0"]),
        models_answer(200),
        1,
        [
            "fault callers --host 0.0.0.0 lets other machines spend your quota: set ",
        ],
    ),
    case(
        "an authority for other programs",
        ({}, {**A_KEY, "NODE_EXTRA_CA_CERTS": "/corp.pem", "SSL_CERT_FILE": "/gone.pem"}, []),
        models_answer(200),
        0,
        [
            "note certificates SSL_CERT_FILE names what is not there, so no authority is trusted",
            "note certificates NODE_EXTRA_CA_CERTS is for other programs: if upstream needs it,",
        ],
    ),
]


@pytest.mark.parametrize(("given", "answer", "code", "told"), DOCTORS)
def test_doctor(
    tmp_path: Path, given: Any, answer: List[bytes], code: int, told: List[str]
) -> None:
    files, env, argv = given
    with FakeUpstream(answer) as fake:
        call, user = call_at_home(
            tmp_path, files, env, *argv, "--base-url", fake.url, "--port", "0"
        )
        assert shim.doctor(call) == code
    lines = [" ".join(line.split()) for line in user.said[0].replace(fake.url, "URL").split("\n")]
    assert [line for line in told if " ".join(line.split()) not in " ".join(lines)] == []
    works = "A request would work." if code == 0 else "No request would work before that is mended."
    assert lines[-1] == works
    assert [s for s in (LONG_KEY, LONG_TOKEN, "rrrr") if s in user.said[0]] == []


def test_doctor_of_an_upstream_that_is_down(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        argv = ["--base-url", f"http://{host}", "--port", "0"]
        call, user = call_at_home(tmp_path, {}, A_KEY, *argv)
        assert shim.doctor(call) == 1
    (line,) = [line for line in user.said[0].split("\n") if line.startswith("fault")]
    assert line.startswith(f"fault  upstream      cannot reach upstream at {host}: ")


def test_doctor_shows_upstream_the_credential_once(tmp_path: Path) -> None:
    with FakeUpstream(models_answer(200)) as fake:
        argv = ["--base-url", fake.url, "--port", "0", "--json"]
        call, user = call_at_home(tmp_path, A_LOGIN, {}, *argv)
        assert shim.doctor(call) == 0
    (request,) = fake.requests
    head = request.decode().split("\r\n")
    assert head[0] == "GET /v1/models?limit=1 HTTP/1.1"
    assert {f"authorization: Bearer {LONG_TOKEN}", "anthropic-beta: oauth-2025-04-20"} <= set(head)
    told = json.loads(user.said[0])
    assert told["works"] is True
    assert {"check": "clock", "verdict": "ok", "sentence": "this clock agrees with upstream's"} in (
        told["checks"]
    )


def test_doctor_renews_no_login_that_it_could_not_write(tmp_path: Path) -> None:
    files = {"state/claude-shim/oauth.json": {**LOGIN_IN_2_HOURS, "expires_at": NOW - 1}}
    with FakeUpstream([json_bytes({"data": []})]) as fake:
        argv = ["--base-url", fake.url, "--token-url", f"{fake.url}/token", "--json"]
        call, user = call_at_home(tmp_path, files, {}, *argv)
        (tmp_path / "state/claude-shim/oauth.json.new").mkdir()  # as good as a full disk
        assert shim.doctor(call) == 1
    assert [request.split()[1] for request in fake.requests] == [b"/v1/models?limit=1"]
    assert "oauth.json cannot be written: " in user.said[0]


def seen_by_doctor(*argv: str, env: Optional[Dict[str, str]] = None, **seen: Any) -> Any:
    """What a check of the doctor looks at; all is well but what is given."""
    call = command_call(ScriptedUser(), *argv, env=env)._replace(clock=lambda: NOW)
    answer = shim.Answer("https://u", 200, "Sat, 21 Nov 2026 22:26:40 GMT")
    return shim.Examination(call, [], "", answer)._replace(**seen)


CHECKED = [
    case("a fine Python", "python", {"python": (3, 9, 0)}, ["ok Python 3.9.0"]),
    case(
        "an old Python",
        "python",
        {"python": (3, 8, 20)},
        ["fault Python 3.8.20 is too old: claude_shim needs 3.9 or newer"],
    ),
    case(
        "a clock ahead",
        "clock",
        {"answer": shim.Answer("https://u", 200, "Sat, 21 Nov 2026 20:00:00 GMT")},
        ["note this clock is 2 hours ahead of upstream's: logins end at the wrong time; set it"],
    ),
    case(
        "a clock behind",
        "clock",
        {"answer": shim.Answer("https://u", 200, "Sat, 21 Nov 2026 22:28:10 GMT")},
        ["note this clock is 1 minute behind upstream's: logins end at the wrong time; set it"],
    ),
    case("no date", "clock", {"answer": shim.Answer("https://u", 200, "")}, []),
    case(
        "a date that is none", "clock", {"answer": shim.Answer("https://u", 200, "yesterday")}, []
    ),
    case(
        "an upstream that cannot be reached",
        "upstream",
        {"answer": shim.Answer("https://u", reason="cannot reach upstream at x: no route")},
        ["fault cannot reach upstream at x: no route"],
    ),
    case(
        "an upstream that answers without the credential",
        "upstream",
        {"answer": shim.Answer("https://u", 200), "fault": "no token"},
        ["ok https://u answers; the credential was not tried"],
    ),
    case(
        "claude_shim before itself",
        "upstream",
        {"answer": shim.Answer("http://localhost:8765", 200)},
        ["fault --base-url is where claude_shim itself listens, port 8765"],
    ),
    case(
        "an upstream that is overloaded",
        "upstream",
        {"answer": shim.Answer("https://u", 529, reason="Overloaded")},
        ["fault https://u answers with status 529: Overloaded"],
    ),
]


@pytest.mark.parametrize(("check", "seen", "expected"), CHECKED)
def test_check_of_doctor(check: str, seen: JSON, expected: List[str]) -> None:
    found = shim.CHECKS[check](seen_by_doctor(**seen))
    assert [" ".join(finding) for finding in found] == expected


def test_check_of_credentials_that_are_not_used() -> None:
    locked = "the keychain is locked: run `security unlock-keychain` first"
    rows = [
        shim.Standing("api-key", "ANTHROPIC_API_KEY", "used", "as the first there is"),
        shim.Standing("claude-code", "FILE", "unused", "API key comes first", "broken", locked),
    ]
    (finding,) = shim.CHECKS["others"](seen_by_doctor(rows=rows))
    assert finding.verdict == "note"
    assert finding.sentence.startswith("login of Claude Code from FILE, drawn from its Claude")
    assert finding.sentence.endswith(f"usage: unused, API key comes first ({locked})")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_key_files_that_others_can_read_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{LONG_KEY}\n")
    path.chmod(0o640)
    note = f"{path} can be read by others: run chmod 600 {path}"
    found = list(shim.CHECKS["callers"](seen_by_doctor("--client-key-file", str(path))))
    assert found == [("ok", "only with a client key"), ("note", note)]
    call, _ = call_at_home(tmp_path, A_LOGIN, {}, "--api-key-file", str(path))
    assert [row.notes for row in shim.standings(call)] == [(f"warning: {note}",), ()]


def test_check_of_a_proxy_shows_no_password(proxy_environment: Any) -> None:
    proxy_environment(HTTPS_PROXY="http://ann:hunter2@proxy.example:3128")
    (finding,) = shim.CHECKS["proxy"](seen_by_doctor())
    assert finding == ("ok", "upstream is reached through proxy.example:3128")
    proxy_environment(HTTPS_PROXY="socks5://proxy.example:1080")
    (finding,) = shim.CHECKS["proxy"](seen_by_doctor())
    assert finding.verdict == "fault"


def test_check_of_a_port_that_is_not_needed() -> None:
    assert not list(shim.CHECKS["port"](seen_by_doctor("--unix", "/run/x")))


def test_check_of_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (finding,) = shim.CHECKS["port"](seen_by_doctor("--port", port))
        owner = shim.port_owner(int(port))
    assert finding == (
        "note",
        f"127.0.0.1:{port} is taken by {owner or 'another program'}; choose another --port",
    )
    if sys.platform == "linux":
        assert owner.endswith(f" ({os.getpid()})")
    assert list(shim.CHECKS["port"](seen_by_doctor("--port", "0"))) == [
        ("ok", "127.0.0.1:0 is free")
    ]


PROC_NET_TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:223D 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1380 1 0
   1: 0100007F:223D 0100007F:B59F 01 00000000:00000000 00:00000000 00000000  1000        0 1381 1 0
   2: 00000000:223E 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1382 1 0
"""


def test_listener_in_proc() -> None:
    assert shim.listening_inodes(PROC_NET_TCP, 8765) == ["1380"]
    assert shim.listening_inodes("", 8765) == []


# --- as a program of its own


def bare_environment(home: Path) -> Dict[str, str]:
    """An environment without settings, keys and configuration files."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    return {**kept, "HOME": str(home), "APPDATA": str(home)}


def run_alone(folder: Path, *argv: str) -> Any:
    """Run a copy of the one file in an empty folder."""
    copy = folder / "claude_shim.py"
    copy.write_bytes(Path(shim.__file__).read_bytes())
    return subprocess.run(
        [sys.executable, "-B", str(copy), *argv],
        cwd=folder,
        env=bare_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_version_of_the_file_alone(tmp_path: Path) -> None:
    ran = run_alone(tmp_path, "--version")
    assert (ran.returncode, ran.stdout) == (0, f"claude_shim {shim.__version__}\n")


def test_start_without_a_credential_ends_with_2_and_the_ways(tmp_path: Path) -> None:
    ran = run_alone(tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"claude_shim: {shim.NO_CREDENTIAL}\n"


def test_command_with_nobody_to_ask_ends_with_1(tmp_path: Path) -> None:
    ran = run_alone(tmp_path, "login", "--bundle", str(tmp_path / "oauth.json"))
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.endswith("Go on? [y/N] Nothing was done. (--yes goes on without asking.)\n")


BROWSER_PROGRAM = """\
import sys, urllib.parse, urllib.request
fields = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(sys.argv[1]).query))
query = urllib.parse.urlencode({"code": "c-1", "state": fields["state"]})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
opener.open(fields["redirect_uri"] + "?" + query).read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere BROWSER opens no program")
def test_login_as_a_program_goes_through_the_browser(tmp_path: Path) -> None:
    script, path = tmp_path / "browser.py", tmp_path / "oauth.json"
    script.write_text(BROWSER_PROGRAM)
    browser = {"BROWSER": f"{sys.executable} {script} %s &"}
    with FakeUpstream([GRANTED]) as fake:
        ran = subprocess.run(
            [
                *(sys.executable, shim.__file__, "login", "--yes", "--bundle", str(path)),
                *("--token-url", f"{fake.url}/v1/oauth/token"),
            ],
            env={**bare_environment(tmp_path), **browser},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert posted(fake)["code"] == "c-1"
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Logged in. " in ran.stdout
    assert path.exists()
    assert path.with_name("oauth.json.lock").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere BROWSER opens no program")
def test_browser_that_fails_is_none(tmp_path: Path) -> None:
    nothing = {"BROWSER": f"{sys.executable} {tmp_path}/gone.py %s", "PATH": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, shim.__file__, "login", "--yes"],
        env={**bare_environment(tmp_path), **nothing},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ran.returncode == 1
    assert "Open this page, agree, and paste the line CODE#STATE" in ran.stdout


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_start_with_the_echo_answers_and_ends_with_0(tmp_path: Path) -> None:
    command = [sys.executable, shim.__file__, "--upstream", "echo", "--port", "0"]
    with subprocess.Popen(
        command,
        env=bare_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            body = json.dumps({**QUESTION, "model": "sonnet"}).encode()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(url + CHAT, body, timeout=10) as response:
                told = json.load(response)
            server.send_signal(signal.SIGTERM)
            _, err = server.communicate(timeout=10)
        finally:
            server.kill()
    assert told["choices"][0]["message"]["content"] == "hi"
    assert server.returncode == 0
    assert re.fullmatch(
        r"POST /v1/chat/completions 200 [0-9.]+ms shim_\w+ model=claude-sonnet-5-5 key=- ok\n", err
    )


@contextlib.contextmanager
def program(
    tmp_path: Path, *argv: str, python: Sequence[str] = (), **environment: str
) -> Iterator[Tuple[Any, Any]]:
    """The program itself, and where it listens."""
    command = [sys.executable, "-S", "-E", *python, str(MODULE_FILE), "--port", "0", *argv]
    with subprocess.Popen(
        command,
        env={**bare_environment(tmp_path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rpartition(":")[2])
            yield process, ("127.0.0.1", port)
        finally:
            process.kill()


posix_only = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def accepts(address: Any) -> bool:
    try:
        socket.create_connection(address, PATIENCE).close()
    except ConnectionError:
        return False
    return True


one_or_two = pytest.mark.parametrize("workers", [1, 2], ids=["alone", "two workers"])


@posix_only
@one_or_two
def test_signal_lets_a_running_answer_end_and_a_second_one_does_not(
    tmp_path: Path, workers: int
) -> None:
    key = {"ANTHROPIC_API_KEY": "sk-ant-api03-x"}
    argv = ("--workers", str(workers))
    with (
        FakeUpstream([BEGUN, UNTIL_GONE]) as fake,
        program(tmp_path, "--base-url", fake.url, *argv, **key) as (process, address),
        socket.create_connection(address, PATIENCE) as client,
        socket.create_connection(address, PATIENCE) as idle,
    ):
        client.sendall(POST_CHAT)
        assert fake.stalled.acquire(timeout=PATIENCE)
        process.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b""
        while workers == 2 and accepts(address):  # until the other has heard of it, too
            pass
        assert not accepts(address)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)  # until nobody has the pipe any longer
        assert process.returncode == 130


@posix_only
@one_or_two
def test_hang_up_signal_reads_the_keys_again_and_drops_nothing(
    tmp_path: Path, workers: int
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    argv = ("--upstream", "echo", "--client-key-file", str(keys), "--workers", str(workers))
    with (
        program(tmp_path, *argv) as (process, address),
        socket.create_connection(address, PATIENCE) as client,
    ):

        def status(key: str) -> bytes:
            field = f"Authorization: Bearer {key}"
            client.sendall(raw_request("GET /v1/models HTTP/1.1", field))
            answer = b""
            while b"}]}" not in answer and b'"code"' not in answer:
                answer += client.recv(1 << 16)
            return answer[9:12]

        assert (status("one"), status("two")) == (b"200", b"401")
        keys.write_text("two\n")
        process.send_signal(signal.SIGHUP)
        for _ in range(workers):
            assert "read again" in read_until(process.stderr, "note: ")
        assert (status("one"), status("two")) == (b"401", b"200")
        keys.write_text("\n")
        process.send_signal(signal.SIGHUP)
        assert "stays as it was" in read_until(process.stderr, "note: ")
        assert status("two") == b"200"


def read_until(stream: Any, start: str) -> str:
    """The next line that begins so."""
    return next(line for line in stream if line.startswith(start))


@posix_only
def test_plain_serving_does_not_import_what_few_need(tmp_path: Path) -> None:
    key = {"ANTHROPIC_API_KEY": "sk-ant-api03-x"}
    with (
        FakeUpstream([WHOLE_STREAM]) as fake,
        program(tmp_path, "--base-url", fake.url, python=("-X", "importtime"), **key) as (
            process,
            address,
        ),
        socket.create_connection(address, PATIENCE) as client,
    ):
        client.sendall(POST_CHAT)
        assert client.recv(12) == b"HTTP/1.1 200"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=PATIENCE)
    imported = set(re.findall(r"\| +([\w.]+)$", told, re.MULTILINE))
    assert "http.server" in imported
    assert imported.isdisjoint({"configparser", "sqlite3", "webbrowser"})


@posix_only
@one_or_two
def test_program_serves_on_a_unix_socket(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-S", "-E", str(MODULE_FILE), "--upstream", "echo"]
    command += ["--workers", str(workers)]
    with subprocess.Popen(
        [*command, "--unix", str(path)],
        env=bare_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith(f"listening on unix:{path}\n")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(HEALTH)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert not path.exists()


# --- as several processes


class Address(NamedTuple):
    """Where a server in another process listens, for a RawClient."""

    server_address: Tuple[str, int]


def worker_of(client: RawClient) -> str:
    """Which process a client is connected to: what its ids of requests have in common."""
    return client.send(HEALTH).answer().headers["x-request-id"].rpartition("_")[0]


@contextlib.contextmanager
def clients_of_two(address: Any) -> Iterator[Dict[str, RawClient]]:
    """Clients that are connected to two processes, by process."""
    found: Dict[str, RawClient] = {}
    deadline = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while len(found) < 2 and time.monotonic() < deadline:
            client = stack.enter_context(RawClient(Address(address)))
            found.setdefault(worker_of(client), client)
        assert len(found) == 2
        yield found


TWO_WORKERS = ("--upstream", "echo", "--workers", "2")


@posix_only
def test_two_workers_know_the_same_responses_and_leave_nothing_behind(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with program(tmp_path, *TWO_WORKERS, TMPDIR=str(temporary)) as (process, address):
        with clients_of_two(address) as clients:
            one, other = clients.values()
            asking: JSON = {"model": "claude-opus-5-5", "input": "hi"}
            for asked, then in ((one, other), (other, one), (one, other)):
                made = json.loads(asked.send(raw_post(RESPONSES, asking)).answer().body)
                asking = {**asking, "previous_response_id": made["id"]}
                answer = then.send(raw_request(f"GET {RESPONSES}/{made['id']} HTTP/1.1")).answer()
                assert json.loads(answer.body) == made
        modes = [path.stat().st_mode & 0o777 for path in temporary.rglob("*.sqlite3")]
        assert modes == [0o600]
        process.send_signal(signal.SIGTERM)
        lines = process.communicate(timeout=PATIENCE)[1].splitlines()
        assert process.returncode == 0
        assert list(temporary.iterdir()) == []
    logged = re.compile(r"(GET|POST) /\S+ 200 [0-9.]+ms (shim_\w+_\w+) model=\S+ key=- ok")
    matched = [logged.fullmatch(line) for line in lines]
    assert None not in matched
    assert len({match[2] for match in matched if match}) == len(lines) >= 8


@posix_only
@pytest.mark.parametrize("workers", ["1", "2"])
def test_signals_are_heeded_as_soon_as_the_program_says_that_it_serves(
    tmp_path: Path, workers: str
) -> None:
    with program(tmp_path, "--upstream", "echo", "--workers", workers) as (process, _):
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline() == "note: the configuration was read again\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


@posix_only
def test_two_workers_let_running_answers_end(tmp_path: Path) -> None:
    go = threading.Event()
    key = {"ANTHROPIC_API_KEY": "sk-ant-api03-x"}
    with (
        FakeUpstream([BEGUN, go, in_chunks(LAST_EVENTS) + LAST_CHUNK]) as fake,
        program(tmp_path, "--base-url", fake.url, "--workers", "2", **key) as (process, address),
    ):
        with clients_of_two(address) as clients, RawClient(Address(address)) as idle:
            for client in clients.values():
                client.send(POST_CHAT)
                assert fake.stalled.acquire(timeout=PATIENCE)
            process.send_signal(signal.SIGTERM)
            assert idle.rest() == b""
            go.set()
            for client in clients.values():
                assert_whole_chat(client.answer())
        assert process.wait(PATIENCE) == 0


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")


def children_of(pid: int) -> List[int]:
    """The processes that a process forked."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@linux_only
def test_worker_that_is_killed_is_replaced_and_the_other_goes_on(tmp_path: Path) -> None:
    with program(tmp_path, *TWO_WORKERS, "--quiet") as (process, address):
        with clients_of_two(address) as before:
            os.kill(children_of(process.pid)[0], signal.SIGKILL)
            assert process.stderr.readline() == "note: worker 1 of 2 ended by signal 9\n"
            (gone,) = shim.readable([client.sock for client in before.values()], PATIENCE)
            (left,) = [name for name, client in before.items() if client.sock is not gone]
            assert worker_of(before[left]) == left
            with clients_of_two(address) as after:
                assert len(set(after) - set(before)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=PATIENCE)[1] == ""
        assert process.returncode == 0


@linux_only
def test_workers_whose_parent_is_killed_end_and_clean_up(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with program(tmp_path, *TWO_WORKERS, TMPDIR=str(temporary)) as (process, address):
        with clients_of_two(address) as clients:
            process.kill()
            assert [client.rest() for client in clients.values()] == [b"", b""]
        process.communicate(timeout=PATIENCE)  # they have this pipe, too
        assert list(temporary.iterdir()) == []
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, PATIENCE)


@linux_only
def test_worker_that_is_told_to_end_drains_and_is_replaced(tmp_path: Path) -> None:
    """As systemd tells all processes of a service: twice is not at once here."""
    with program(tmp_path, *TWO_WORKERS, "--quiet") as (process, address):
        with clients_of_two(address):
            first = children_of(process.pid)[0]
        os.kill(first, signal.SIGTERM)
        assert process.stderr.readline() == "note: worker 1 of 2 ended by code 0\n"
        for pid in (*children_of(process.pid), process.pid):
            os.kill(pid, signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


BROKEN_WORKERS = """\
import sys, claude_shim

class Broken(claude_shim.Server):
    def take_part(self, number, crowd):
        raise RuntimeError

claude_shim.Supervisor.MAX_PAUSE = 0.0
app = claude_shim.App(claude_shim.EchoUpstream(), log=claude_shim.Log(sys.stderr))
sys.exit(claude_shim.Supervisor(Broken(app), 2, lambda: True).run(lambda: None))
"""


@posix_only
def test_workers_that_cannot_start_are_no_endless_loop(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", BROKEN_WORKERS],
        cwd=MODULE_FILE.parent,
        env=bare_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    assert "error: workers end as soon as they start, so this is the end" in lines
    assert len([line for line in lines if line.endswith(" of 2 ended by code 1")]) in (6, 7)


def test_worker_that_fails_for_hours_is_started_again_all_the_same() -> None:
    """Beside one that works: some thousand failures in a row ended the parent."""
    pauses = [shim.Supervisor.pause_after(failures) for failures in (1, 2, 6, 7, 1024, 100_000)]
    assert pauses == [0.2, 0.4, 6.4, 10.0, 10.0, 10.0]


def test_more_workers_than_requests_at_a_time_are_refused() -> None:
    settings = settings_of("--upstream", "echo", "--workers", "3", "--max-concurrent", "2")
    with pytest.raises(shim.ConfigError) as caught:
        shim.limits_from(settings)
    assert str(caught.value) == (
        "--workers 3: none would be left for some, --max-concurrent is 2"
        if hasattr(os, "fork")
        else "--workers: this system cannot fork, so only one process can serve"
    )


# --- as a library


class FixedApp(shim.App):
    """Answers every request in the same way."""

    def __init__(self, response: shim.Response, log: shim.Log) -> None:
        super().__init__(ScriptedUpstream(FINE), log=log)
        self._response = response

    def answering(self, request: shim.Request) -> shim.Conversation[shim.Response]:
        return self._response
        yield


def test_fault_of_ours_in_a_stream_is_an_error_and_is_reported() -> None:
    class Broken(shim.EventTransform):
        def feed(self, burst: bytes) -> bytes:
            raise KeyError("oh")

    lines = io.StringIO()
    stream = shim.Stream(
        ScriptedSource([sse(*TEXT_EVENTS)]), Broken(shim.ChatStreamEncoder(shim.ChatReply()))
    )
    app = FixedApp(shim.Response(200, [], stream), shim.Log(lines))
    with shim.Server(app) as server, RawClient(server) as client:
        made = client.send(POST_CHAT).rest()
    assert b"claude_shim failed on this answer" in made
    assert not made.endswith(LAST_CHUNK)
    assert "KeyError at" in lines.getvalue()
    assert not stream.transform.complete


def test_answer_that_failed_is_forgotten_without_the_garbage_collector() -> None:
    class Large(shim.GatheringSink):
        pass

    sink = Large()
    left = weakref.ref(sink)
    source = ScriptedSource([sse(*TEXT_EVENTS[:4]), shim.UpstreamCutError("cut")])
    stream = shim.Stream(source, shim.EventTransform(sink))
    failed = shim.Response(502, [], b"{}")
    app = FixedApp(shim.Response(200, [], shim.Gathered([stream], lambda: failed)), shim.Log())
    del sink, stream
    gc.disable()
    try:
        with shim.Server(app) as server, RawClient(server) as client:
            assert client.send(POST_CHAT).answer().status == 502
            app._response = failed
            assert client.send(POST_CHAT).answer().status == 502
        assert left() is None
    finally:
        gc.enable()


ODD_ENDS = [
    case("an empty line too many", sse(*TEXT_EVENTS[:6]) + b"\n" + sse(*TEXT_EVENTS[6:]), True),
    case("infinity", sse(*TEXT_EVENTS[:6]) + b'data: {"type":"x","n":1e999}\n\n', False),
    case("NaN", sse(*TEXT_EVENTS[:6]) + b'data: {"type":"x","n":NaN}\n\n', False),
]


@pytest.mark.parametrize(("raw", "whole"), ODD_ENDS)
def test_odd_events_of_upstream_are_skipped_or_told(raw: bytes, whole: bool) -> None:
    for size in (len(raw), 1):
        transform = shim.EventTransform(shim.ChatStreamEncoder(shim.ChatReply()))
        pieces = [transform.feed(raw[i : i + size]) for i in range(0, len(raw), size)]
        last = chunks(b"".join(pieces) + transform.end())[-1]
        assert (last == "[DONE]") is whole
        assert whole or "error" in last


def test_refusals_that_undo_each_other_end_after_some_tries() -> None:
    undoing = 'adaptive thinking is not supported; "thinking.type.enabled" is not supported'
    app, upstream = app_on(refused(400, "invalid_request_error", undoing))
    body = {**QUESTION, "model": "claude-opus-4-6", "reasoning_effort": "high"}
    assert answered(ask(app, CHAT, body))["error"]["message"] == undoing
    assert 1 < len(upstream.requests) <= 1 + shim.MAX_CURES


def test_short_secrets_do_not_break_an_answer() -> None:
    app, _ = app_on(refused(404, "not_found_error", "no code here"))
    app.log = shim.Log(None, ["code", "null"])
    error = answered(ask(app, CHAT, QUESTION))["error"]
    assert (error["message"], error["code"]) == ("no [secret] here", "not_found")


HOSTILE_BODIES = [
    case("a tool whose type is missing", {"tools": [{"None": {"name": "a"}}]}),
    case("a choice whose type is missing", {"tools": ONE_TOOL, "tool_choice": {"None": {}}}),
    case("a format that is text", {"output_config": {"format": "x"}}),
    case(
        "a result that is a number",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t", "content": 5}],
                }
            ]
        },
    ),
]


@pytest.mark.parametrize("fields", HOSTILE_BODIES)
def test_hostile_body_is_a_400(fields: JSON) -> None:
    app, upstream = app_on(streamed(*TEXT_EVENTS))
    assert ask(app, CHAT, {**QUESTION, **fields}).status == 400
    assert upstream.requests == []


def test_mark_that_is_no_object_is_none() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "cache_control": "x"}
    app, _ = app_on(streamed(*TEXT_EVENTS))
    assert ask(app, CHAT, {**QUESTION, "tools": [search]}).status == 200


class Counted(str):
    """A name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__ne__(self, other)

    __hash__ = str.__hash__


COUNTED = [Counted(f"name_{n}") for n in range(2000)]


@pytest.mark.parametrize(
    "fields",
    [
        case("tools", {"tools": [{"type": "function", "name": name} for name in COUNTED]}),
        case("unknown fields", dict.fromkeys(COUNTED, 1)),
        case(
            "calls",
            {
                "messages": [
                    {"role": "user", "content": "go"},
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": name, "function": {"name": "f", "arguments": "{}"}}
                            for name in COUNTED
                        ],
                    },
                ]
            },
        ),
    ],
)
def test_names_of_a_body_are_not_compared_each_with_each(fields: JSON) -> None:
    Counted.compared = 0
    shim.messages_request_from_chat({**QUESTION, **fields}, "claude-opus-5").finished()
    assert Counted.compared < 20 * len(COUNTED)


def test_header_that_names_what_is_ignored_stays_short() -> None:
    app, _ = app_on(streamed(*TEXT_EVENTS))
    body = {**QUESTION, **{f"field{n}": 1 for n in range(20_000)}}
    ignored = dict(ask(app, CHAT, body).headers)["x-claude-shim-ignored"]
    assert len(ignored) < 2100
    assert ignored.endswith("...")


def test_importing_starts_no_thread_and_opens_nothing() -> None:
    """S4-B29: a program was run at import time."""
    seen: List[str] = []
    watching = [True]
    watched = ("socket.", "subprocess.", "os.system", "os.exec", "urllib.", "_thread.")

    def hook(event: str, arguments: Any) -> None:
        if watching and event.startswith(watched):
            seen.append(event)

    sys.addaudithook(hook)  # stays until the process ends; idle once `watching` is empty
    threads = threading.active_count()
    spec = importlib.util.spec_from_file_location("claude_shim_again", shim.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    watching.clear()
    assert module.__version__ == shim.__version__
    assert (seen, threading.active_count()) == ([], threads)


def test_library_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(shim.__file__).with_name("README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- example: library -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    exec(compile(found.group(1), "README.md", "exec"), {})
    assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+\n", capsys.readouterr().out)


def test_public_names_are_there_and_documented() -> None:
    assert [name for name in shim.__all__ if not getattr(shim, name).__doc__] == []
