"""shipped_code.py: files that a folder's scripts reach, and packed code that is read, never run."""

import ast
import base64
import bz2
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path

import brotli
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.shipped_code import (
    MOST_CODE,
    import_closure,
    imports_in,
    read_code,
    read_code_file,
)
from fairway.records.syntax import parse_python, without_f_strings
from fairway.records.unpack import LIMIT, archive_members
from tests.zoo.records import write
from tests.zoo.records.good import REPORT, TRAINER, stub

ROOT = Path(__file__).resolve().parents[2]


def written(folder: Path, files: dict[str, str]) -> dict[str, int]:
    write({name: text.encode() for name, text in files.items()}, folder)
    return {name: len(text.encode()) for name, text in files.items()}


def test_imports_are_found_at_any_depth_and_in_every_form():
    source = read_code_file(
        "a/b.py",
        b"""
import os, x.y
from . import near
from ..far import thing
def f():
    import lazy
    importlib.import_module("named.one")
    subprocess.run([sys.executable, "-m", "run.me"])
try:
    import maybe
except ImportError:
    pass
""",
    )
    found = {(i.module, i.names, i.optional) for i in imports_in(source)}
    assert {
        ("os", (), False),
        ("x.y", (), False),
        ("a", ("near",), False),
        ("far", ("thing",), False),
        ("lazy", (), False),
        ("named.one", (), False),
        ("run.me", (), True),
        ("maybe", (), True),
    } == found


def test_the_closure_follows_packages_relative_and_lazy_imports(tmp_path):
    written(
        tmp_path,
        {
            "train_gpt.py": "import helper\ndef f():\n    from pack.deep import thing",
            "helper.py": "",
            "unused.py": "import os",
            "pack/__init__.py": "from .first import *",
            "pack/first.py": "",
            "pack/other.py": "",
            "pack/deep/__init__.py": "from . import thing",
            "pack/deep/thing.py": "from ..last import x",
            "pack/last.py": "",
        },
    )
    assert import_closure(tmp_path, ["train_gpt.py"]) == [
        "helper.py",
        "pack/__init__.py",
        "pack/deep/__init__.py",
        "pack/deep/thing.py",
        "pack/first.py",
        "pack/last.py",
        "train_gpt.py",
    ]


def test_our_own_closure_has_what_evaluation_imports():
    found = import_closure(ROOT)
    assert {
        "train_gpt.py",
        "eval_final.py",
        "fairway/scoring/evaluation.py",
        "fairway/compression/proof.py",
    } <= set(found)
    assert not any(name.startswith(("tests", "bench", "data", "fairway/records")) for name in found)


def test_code_ships_if_an_entry_script_reaches_it(tmp_path):
    code = read_code(
        tmp_path,
        written(
            tmp_path,
            {
                "train_gpt.py": "import helper\nexec(open('more.py').read())",
                "helper.py": "import nowhere, numpy, json",
                "more.py": "NAME = 'kernel.cpp'",
                "kernel.cpp": "int x;",
                "other.cpp": "int y;",
                "prepare_data.py": "import requests",
                "source/train_gpt.py": "x = 1",
                "tests/test_a.py": "",
            },
        ),
    )
    assert set(code.shipped) == {"train_gpt.py", "helper.py", "more.py", "kernel.cpp"}
    assert [(a.module, a.file, a.line) for a in code.absent if a.module != "numpy"] == [
        ("nowhere", "helper.py", 1)
    ]


def test_a_module_that_its_package_lacks_is_absent(tmp_path):
    sizes = written(
        tmp_path, {"train_gpt.py": "from pack.gone import f\nimport pack", "pack/__init__.py": ""}
    )
    assert [a.module for a in read_code(tmp_path, sizes).absent] == ["pack.gone"]


LAYERS = {
    "lzma, base85": (stub(TRAINER), ("b85", "lzma")),
    "zlib, base64": (
        "import zlib, base64\nexec(zlib.decompress(base64.b64decode("
        f"{base64.b64encode(zlib.compress(TRAINER.encode()))!r})).decode())",
        ("b64", "zlib"),
    ),
    "bz2, from": (
        "from bz2 import decompress as "
        f"d\nexec(compile(d({bz2.compress(TRAINER.encode())!r}),'x','exec'))",
        ("bz2",),
    ),
    "brotli, a name": (
        "import brotli\nfrom base64 import b85decode\nDATA = ("
        + repr(base64.b85encode(brotli.compress(TRAINER.encode())).decode())
        + ")\nexec(brotli.decompress(b85decode(DATA)))",
        ("b85", "brotli"),
    ),
    "raw lzma": (
        "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("
        + repr(
            base64.b85encode(
                lzma.compress(
                    TRAINER.encode(), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]
                )
            ).decode()
        )
        + '),format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]))',
        ("b85", "lzma"),
    ),
    "two layers": (stub(stub(TRAINER)), ("b85", "lzma", "b85", "lzma")),
    "__import__": (
        f"exec(__import__('zlib').decompress({zlib.compress(TRAINER.encode())!r}))",
        ("zlib",),
    ),
}


@pytest.mark.parametrize("text,layers", LAYERS.values(), ids=LAYERS)
def test_stubs_are_unpacked(text, layers):
    source = read_code_file("train_gpt.py", text.encode())
    assert (
        source.text == TRAINER
        and source.layers == layers
        and source.tree is not None
        and not source.fault
    )


def test_plain_code_is_no_stub():
    assert not read_code_file("train_gpt.py", TRAINER.encode()).packed


@pytest.mark.parametrize(
    "bomb",
    [
        f"import zlib\nexec(zlib.decompress({zlib.compress(bytes(LIMIT + 10), 9)!r}))",
        "import lzma\nexec(lzma.decompress(b'', format=lzma.FORMAT_RAW, filters=[{'id': "
        "lzma.FILTER_LZMA2, 'dict_size': 4000000000}]))",
        "import lzma\nexec(lzma.decompress(b'abc'))",
        "import base64\nexec(base64.b85decode('\\x00'))",
        "import brotli\nexec(brotli.decompress(b'\\xff\\xff'))",
        "exec(a)\na = a + a",
        "exec(open('/etc/passwd').read())",
    ],
    ids=["zlib bomb", "dictionary", "no lzma", "no base85", "no brotli", "a loop", "a file"],
)
def test_code_that_cannot_be_unpacked_stays_packed(bomb):
    source = read_code_file("train_gpt.py", bomb.encode())
    assert source.layers == () and source.text == bomb


def test_nothing_of_a_stub_is_run(tmp_path):
    trace = tmp_path / "ran"
    text = stub(f"open({str(trace)!r}, 'w').write('x')")
    assert "open(" in read_code_file("train_gpt.py", text.encode()).text and not trace.exists()


def test_archives_of_code_are_opened():
    files = {"train_gpt.py": TRAINER, "fairway/a.py": "x = 1", "notes.txt": ""}
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as z, tarfile.open(fileobj=tarred, mode="w") as t:
        for name, text in files.items():
            z.writestr(name, text)
            info = tarfile.TarInfo(name)
            info.size = len(text)
            t.addfile(info, io.BytesIO(text.encode()))
    packed = lzma.compress(
        json.dumps({n: t for n, t in files.items() if n.endswith(".py")}).encode()
    )
    for data in (zipped.getvalue(), tarred.getvalue(), lzma.compress(tarred.getvalue()), packed):
        found = archive_members("code.xz", data)
        assert {name: text.decode() for name, text in found.items()} == {
            "code.xz!train_gpt.py": TRAINER,
            "code.xz!fairway/a.py": "x = 1",
        }
    assert (
        archive_members("code.xz", b"no archive")
        == {}
        == archive_members("code.xz", lzma.compress(bytes(LIMIT + 1)))
    )


DEEP = [
    "(" * 5000,
    "[" * 100 + "]" * 100,
    "-" * 60_000 + "1",
    "a" + ".a" * 20_000,
    "x = " + "1+" * 20_000 + "1",
    "\0",
    "f'{'",
]


@pytest.mark.parametrize("text", DEEP, ids=range(len(DEEP)))
def test_code_of_any_depth_is_read_or_refused(text):
    source = read_code_file("a.py", text.encode())
    assert (source.tree is None) == bool(source.fault)
    list(imports_in(source))


def test_odd_escapes_in_foreign_code_give_no_warning(recwarn):
    assert read_code_file("a.py", b"x = '\\W'\n").tree is not None and not list(recwarn)


@given(at=st.integers(0, 300), new=st.binary(max_size=8), cut=st.booleans())
def test_damaged_stubs_are_read_as_something(at, new, cut):
    data = stub(REPORT).encode()
    source = read_code_file(
        "train_gpt.py", data[:at] + new + (b"" if cut else data[at + len(new) :])
    )
    assert isinstance(source.text, str) and (source.tree is None) == bool(source.fault)


@pytest.mark.parametrize(
    "text,tree",
    [
        ('x = f"a{b["k"]}{c:>{w}}"', 'x = ("", b["k"], c, w)'),
        ('f"{d}{f"{e.load(1):.2f}"}{{no}}"', '("", d, ("", e.load(1)))'),
        ("y = f'{g!=h}{i=}{j!r}' # f\"{\"", 'y = ("", g != h, i, j)'),
        ('print("f{", f"""a\n{b}""", "\\"f{")', 'print("f{", ("", b), "\\"f{")'),
    ],
)
def test_f_strings_of_a_newer_python_are_read(text, tree):
    assert ast.dump(ast.parse(without_f_strings(text))) == ast.dump(ast.parse(tree))
    assert parse_python(text)[0] is not None


@given(st.text(alphabet="f\"'{}!:=a \\\n#", max_size=200))
def test_any_quotes_and_braces_end(text):
    assert isinstance(without_f_strings(text), str)


def test_more_code_than_a_record_can_have_is_not_parsed(tmp_path):
    files = {
        "train_gpt.py": "import helper",
        "helper.py": "x = 1\n" * (MOST_CODE // 6 + 1),
        **{f"a/{i}.py": "" for i in range(20)},
    }
    code = read_code(tmp_path, written(tmp_path, files))
    assert (
        "at most" in code.sources["helper.py"].fault
        and code.sources["train_gpt.py"].tree is not None
    )
    assert code.entries == ("train_gpt.py",) and code.bytes == sum(
        len(files[name]) for name in code.shipped
    )
