"""Public corpora against the shim on `--upstream echo`, over sockets: each judged by its authors.

gunicorn's valid and invalid request files and JSONTestSuite are looked for in SHIM_CORPORA, else in
../../shared/corpora beside the repository. They are not part of it: where they are absent, this
check says so and passes.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import sys
from collections.abc import Iterator

from wire import HERE, LAST, Answer, Shim, all_of, answers, check, exchanged, post, run, shim

CORPORA = os.environ.get("SHIM_CORPORA", os.path.join(HERE, "..", "..", "shared", "corpora"))
REQUESTS = os.path.join(CORPORA, "gunicorn-requests", "tests", "requests")
DOCUMENTS = os.path.join(CORPORA, "JSONTestSuite", "test_parsing")

READ = 299  # stands for: the body was read, and was no chat request
OF_THE_WIRE = {400, 408, 413, 414, 415, 431, 501, 505}  # refused before any endpoint is looked up

# Files that gunicorn takes and we refuse, the Host that most of them lack apart: (status, why).
STRICTER = {
    "009": (400, "Transfer-Encoding together with Content-Length (RFC 9112 6.1)"),
    "025": (501, "gzip as a transfer coding (RFC 9112 7: 501 for one that is not understood)"),
    "025_line": (501, "gzip as a transfer coding"),
    "027": (400, "a byte over 127 in the target (RFC 9112 3.2)"),
    "028": (400, "white space before the colon (RFC 9112 5.1: must be refused)"),
    "029": (501, "identity as a transfer coding"),
    "030": (501, "identity as a transfer coding"),
    "compat_obs_fold": (400, "a folded field (RFC 9112 5.2: may be refused)"),
    "compat_obs_fold_huge": (400, "a folded field (RFC 9112 5.2: may be refused)"),
    "pp_01": (400, "the PROXY protocol, which is not offered"),
    "pp_02": (400, "the PROXY protocol, which is not offered"),
    "pp_04": (400, "the PROXY protocol, which is not offered"),
    "pp_05": (400, "the PROXY protocol, which is not offered"),
    "rfc9112_smuggle_gzip_chunked_01": (501, "gzip as a transfer coding"),
    "rfc9112_smuggle_te_identity_chunked_01": (501, "identity as a transfer coding"),
    "rfc9112_target_absolute_userinfo_01": (400, "a user in the target (RFC 9110 4.2.4)"),
    "rfc9112_target_authority_connect_01": (400, "CONNECT: this is no proxy"),
    "rfc9112_target_authority_ipv6_01": (400, "CONNECT: this is no proxy"),
}

# Files that gunicorn refuses for a reason of its own, and why it is none here.
NOT_MOVED = {
    "020": "its body is a request, which the Host added here would lengthen",
    "099": "the corpus holds less of its body than its Content-Length says",
}

NOT_OURS = {
    "003c": "a method of fewer than three letters: to us any token is one, and then unknown",
    "006": "over gunicorn's limit of 4,094 bytes in the request line; ours is 16 KiB",
    "007": "over gunicorn's limit of 8,190 bytes in a field; ours is 16 KiB",
    "008": "over gunicorn's limit of 8,190 bytes in a field; ours is 16 KiB",
    "009": "over gunicorn's limit of 100 fields; ours is 128",
    "010": "over a limit that gunicorn's test sets for itself (bytes of a field)",
    "011": "over a limit that gunicorn's test sets for itself (number of fields)",
    "012": "over a limit that gunicorn's test sets for itself (bytes of a field)",
    "017": "over a limit that gunicorn's test sets for itself (bytes of a field)",
    "019": "forwarded-proto fields that disagree: we read none of them",
    "040": "a name with an underscore: only CGI's variables mix it up with the one with a hyphen",
    "chunked_07": "a name with an underscore: as above",
    "chunked_09": "a blank after a chunk's size: some pad it so; it can be read in one way only",
    "limit_header_default_01": "over gunicorn's limit of 8,190 bytes in a field; ours is 16 KiB",
}


def present(folder: str) -> bool:
    if not os.path.isdir(folder):
        print(f"     absent: {folder} (set SHIM_CORPORA)")
    return os.path.isdir(folder)


# --- gunicorn's requests --------------------------------------------------------------------------


def request_files(kind: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file; line ends are written out, the real ones do not count."""
    for name in sorted(os.listdir(os.path.join(REQUESTS, kind))):
        with open(os.path.join(REQUESTS, kind, name), "rb") as file:
            raw = file.read().replace(b"\n", b"")
        for written, meant in ((rb"\r", b"\r"), (rb"\n", b"\n"), (rb"\0", b"\0"), (rb"\t", b"\t")):
            raw = raw.replace(written, meant)
        raw = re.sub(rb"\\x([0-9a-fA-F]{2})", lambda m: bytes([int(m[1], 16)]), raw)
        yield name[: -len(".http")], raw


def with_host(raw: bytes) -> bytes:
    """The requests with the Host that gunicorn does not ask for, at any server's taste."""

    def mended(head: re.Match[bytes]) -> bytes:
        return head[0] if re.search(rb"\r\nhost:", head[0], re.I) else head[1] + ours + head[2]

    ours = b"\r\nHost: localhost"
    return re.sub(rb"([^\r\n]+ HTTP/1\.1)((?:\r\n[^\r\n]+)*\r\n\r\n)", mended, raw)


def statuses(port: int, raw: bytes) -> list[int]:
    """The statuses of all answers; 0 at the end if the shim waited for more."""
    came, closed = exchanged(port, raw, silence=0.4)
    found = [READ if about_body(answer) else answer.status for answer in answers(came)]
    return found if closed else [*found, 0]


def about_body(answer: Answer) -> bool:
    about = b"the request body" in answer.body or b'"param":"model"' in answer.body
    return answer.status == 400 and about


_LINE = re.compile(rb"^[A-Z]+ /[^ ]* (HTTP/1\.[01]\r\n)")


def moved(raw: bytes) -> bytes:
    """The request at an endpoint that reads bodies: elsewhere it is a 404 before that."""
    return _LINE.sub(rb"POST /v1/chat/completions \1", raw)


def valid_problem(port: int, name: str, raw: bytes) -> str:
    status, reason = STRICTER.get(name, (0, ""))
    there, moved_there = (statuses(port, each(with_host(raw)) + LAST) for each in (bytes, moved))
    if status:
        kept = 200 in there + moved_there  # then what followed was taken for a request
        right = status in there + moved_there and not kept
        return "" if right else f"valid/{name}: {there}, {moved_there}, not {status} ({reason})"
    wrong = OF_THE_WIRE & set(there) or there[:1] == [0]
    return f"valid/{name}: {there}" if wrong else ""


def in_step_problem(port: int, name: str, raw: bytes) -> str:
    """Where a body is read, what follows it must be taken for the next request."""
    framed = re.search(rb"\r\n(content-length: [1-9]|transfer-encoding)", raw, re.I)
    if not framed or name in STRICTER or name in NOT_MOVED or not _LINE.match(raw):
        return ""
    found = statuses(port, moved(with_host(raw.replace(b" HTTP/1.0", b" HTTP/1.1"))) + LAST)
    wanted = [READ, *[404] * raw.count(b"\r\n\r\nGET /second", raw.find(b"chunked")), 200]
    return "" if found == wanted else f"valid/{name}, moved: {found}, not {wanted}"


def hosts() -> list[str]:
    """The names that the files ask for: a foreign one would be refused for another reason."""
    names = ["example.com", "x", "a", "0.0.0.0", "evil.example.com"]
    return [word for name in names for word in ("--allow-host", name)]


@check("gunicorn's valid requests are taken, or refused for a reason written out here")
def valid_requests() -> str:
    if not present(REQUESTS):
        return "left out"
    files = list(request_files("valid"))
    with shim("--upstream", "echo", *hosts()) as server:
        problems = [valid_problem(server.port, *file) for file in files]
        problems += [in_step_problem(server.port, *file) for file in files]
        without = [raw for _, raw in files if re.match(rb"[A-Z]+ /[!-~]* HTTP/1\.1\r\n", raw)]
        problems += [
            f"without Host: {found} for {raw[:60]!r}"
            for raw in without
            if with_host(raw) != raw and (found := statuses(server.port, raw)) != [400]
        ]
    all_of([problem for problem in problems if problem])
    return f"{len(files)} files, {len(STRICTER)} refused for a stated reason"


@check("gunicorn's invalid requests are refused")
def invalid_requests() -> str:
    if not present(REQUESTS):
        return "left out"
    files = list(request_files("invalid"))
    with shim("--upstream", "echo", *hosts()) as server:
        problems = []
        for name, raw in files:
            found = statuses(server.port, moved(with_host(raw)))
            refused = bool(OF_THE_WIRE & set(found[-1:])) or found == [0]
            if refused == (name in NOT_OURS):
                problems.append(f"invalid/{name}: {found} {NOT_OURS.get(name, '')}")
    all_of(problems)
    return f"{len(files)} files, {len(NOT_OURS)} of them for no reason of ours"


# --- JSONTestSuite --------------------------------------------------------------------------------

_WORDS = b'{"role":"user","content":"hi"}'


def inside(document: bytes) -> bytes:
    """A chat request that holds the document in a field which is ignored, whatever it is."""
    return b'{"model":"opus","messages":[' + _WORDS + b'],"metadata":' + document + b"}"


def complaint(status: int, body: bytes) -> str:
    return str(json.loads(body)["error"]["message"]) if status >= 400 else ""


def document_problem(server: Shim, name: str, document: bytes) -> str:
    """The whole body must be an object, so y_ may be refused there, but never as bad JSON."""
    problems = []
    for place, body in (("whole", document), ("inside", inside(document))):
        raw, _ = exchanged(server.port, post("/v1/chat/completions", body))
        answer = answers(raw)[0]
        said = complaint(answer.status, answer.body)
        parsed = answer.status == 200 or not re.search(r"not JSON|not UTF-8|too deeply", said)
        wrong = {"y": not parsed, "n": answer.status // 100 != 4, "i": answer.status >= 500}
        # One text of the suite is no JSON by itself and harmless where more JSON follows.
        if wrong[name[0]] or answer.status >= 500:
            problems.append(f"{name} ({place}): {answer.status} {said[:80]}")
    return "; ".join(problems)


@check("JSONTestSuite as a whole body and inside a request: y_ is read, n_ a 4xx, nothing a 5xx")
def json_documents() -> str:
    if not present(DOCUMENTS):
        return "left out"
    files = sorted(os.listdir(DOCUMENTS))
    with shim("--upstream", "echo") as server, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def problem(name: str) -> str:
            with open(os.path.join(DOCUMENTS, name), "rb") as file:
                return document_problem(server, name, file.read())

        problems = [text for text in pool.map(problem, files) if text]
    all_of(problems)
    return f"{len(files)} documents, each in two places"


if __name__ == "__main__":
    sys.exit(run("corpora"))
