"""The shape of the code: who imports whom, the truth beside each operator, names and sizes."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "polyrank"
TESTS = ROOT / "tests"

# A module imports lower numbers only; equal numbers never each other.
LEVEL = {
    "errors": 0,
    "_version": 0,
    "pairs": 0.5,
    "ops": 1,
    "frame": 2,
    "layers": 3,
    "parts": 4,
    "methods": 5,
    "io": 6,
    "streams": 6,
    "metrics": 6,
    "engine": 7,
    "reports": 8,
    "recipes": 8,
    # The front door re-exports the levels below; inside the package only the command line uses it.
    "polyrank": 8.5,
    "cli": 9,
    "__main__": 10,
}
TESTING_LEVEL = 8  # what testing must stay below: it may import levels 0 to 7
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "triton"}
LIGHT = [SRC / "metrics", SRC / "reports", SRC / "io" / "runs.py", SRC / "errors.py"]

CODE_LINES = {"src": 400, "tests": 500, "methods": 120, "cli": 80}
FUNCTION_LINES = 60
# Files or functions above their limit, each with the reason why splitting it would read worse.
LONGER: dict[str, str] = {
    "src/polyrank/cli/choices.py": "all faults of a command line are gathered in one place",
    "src/polyrank/cli/main.py": "the list of sub-commands beside what makes every stream safe",
    "src/polyrank/cli/run.py": "seventeen options, each with its help",
    "src/polyrank/cli/run.py:command": "twenty-one options, each with its help",
    "src/polyrank/engine/loop.py:run": "fifteen arguments, each explained",
    "src/polyrank/methods/codyra.py": "twelve options of its own, each explained",
    "src/polyrank/methods/mixlora.py": "thirteen options, each explained, and three routers",
    "src/polyrank/methods/moe_lora.py": "eleven published methods behind one set of options",
    "src/polyrank/methods/sema.py": "eighteen options, each explained",
    "src/polyrank/methods/osf.py": "eighteen options, each explained, and four published settings",
    "src/polyrank/methods/sora.py": "twelve options, each explained, and two published settings",
}


def sources(root=SRC):
    found = sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)
    assert found, f"no Python file below {root}"
    return found


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def folder(module):
    """The level name of a dotted module inside polyrank: 'polyrank.io.runs' → 'io'."""
    parts = module.split(".")
    if len(parts) == 1:
        return parts[0]
    return parts[1] if parts[1] in LEVEL or (SRC / parts[1]).is_dir() else "polyrank"


def imports(node):
    """Every module imported anywhere in a syntax tree, under TYPE_CHECKING and in functions too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (name.name for name in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, f"relative import in line {part.lineno}"
            # `from polyrank import ops` names a folder, `from polyrank import run` the front door.
            yield from (f"{part.module}.{name.name}" for name in part.names)


def inner(node):
    return {folder(name) for name in imports(node) if name.split(".")[0] == "polyrank"}


def outer(node):
    return {name.split(".")[0] for name in imports(node)} - {"polyrank"}


def edges(root=SRC):
    """The pairs (importing folder, imported folder), each with one file that has it."""
    found = {}
    for path in sources(root):
        relative = path.relative_to(root)
        if relative == Path("__init__.py"):
            continue
        here = relative.parts[0].removesuffix(".py")
        for there in inner(tree(path)) - {here}:
            found.setdefault((here, there), str(relative))
    return found


def wrong(found):
    """The edges that the table of levels forbids."""
    bad = {}
    for (here, there), path in found.items():
        level = TESTING_LEVEL if here == "testing" else LEVEL[here]
        if here == "testing" and there == "polyrank":
            continue
        if there == "testing" or LEVEL[there] >= level:
            bad[here, there] = path
    return bad


def code_lines(path):
    """Lines that hold code: neither blank nor comment nor docstring."""
    text = path.read_text(encoding="utf-8")
    skip = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skip.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and n not in skip for n, line in lines)


def test_every_folder_has_a_level():
    here = {
        p.stem for p in SRC.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))
    }
    assert here - {"__init__"} <= {*LEVEL, "testing"}


def test_lower_levels_never_import_higher_ones():
    assert wrong(edges()) == {}


@pytest.mark.parametrize(
    ("path", "source", "edge"),
    [
        ("ops/a.py", "from polyrank.frame import Flow", ("ops", "frame")),
        ("frame/a.py", "def f():\n    import polyrank.layers.linear", ("frame", "layers")),
        ("io/a.py", "from polyrank import streams", ("io", "streams")),
        ("engine/a.py", "from polyrank import run", ("engine", "polyrank")),
        ("engine/a.py", "import polyrank as pr", ("engine", "polyrank")),
        ("cli/a.py", "from polyrank.testing import TOL", ("cli", "testing")),
        ("testing/a.py", "from polyrank.reports import html", ("testing", "reports")),
        (
            "layers/a.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from polyrank.engine import run",
            ("layers", "engine"),
        ),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path, path, source, edge):
    file = tmp_path / path
    file.parent.mkdir()
    file.write_text(source)
    assert wrong(edges(tmp_path)) == {edge: path}


def test_allowed_imports_pass(tmp_path):
    for path, source in {
        "__init__.py": "from polyrank.cli import main",
        "cli/a.py": "import polyrank as pr\nfrom polyrank.reports import html",
        "testing/a.py": "import polyrank as pr\nfrom polyrank import engine",
        "engine/a.py": "from polyrank.engine.b import c\nfrom polyrank import io, errors",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    assert len(edges(tmp_path)) == 6
    assert wrong(edges(tmp_path)) == {}


@pytest.mark.parametrize("root", LIGHT, ids=lambda path: str(path.relative_to(SRC)))
def test_reading_results_needs_no_torch(root):
    for path in sources(root) if root.is_dir() else [root]:
        assert not outer(tree(path)) & HEAVY, path


def test_metrics_need_numpy_only():
    for path in sources(SRC / "metrics"):
        # Scores of classes and numbers are scikit-learn's, loaded when one is asked for.
        allowed = {"numpy", "scipy", "sklearn"} if path.name == "scores.py" else {"numpy"}
        assert outer(tree(path)) - set(sys.stdlib_module_names) <= allowed, path
        assert inner(tree(path)) <= {"metrics", "errors"}, path


def operators():
    return sorted(path for path in (SRC / "ops").glob("[!_.]*") if path.is_dir())


def test_there_are_operators():
    assert "rank_gate" in [path.name for path in operators()]


@pytest.mark.parametrize("path", operators(), ids=lambda path: path.name)
def test_every_operator_has_a_short_truth(path):
    truth = path / "naive.py"
    assert truth.is_file(), (
        f"{path.name}: expected naive.py, the plain form that kernels are held to"
    )
    assert 0 < code_lines(truth) <= 40


def test_code_lines_counts_code(tmp_path):
    file = tmp_path / "a.py"
    function = 'def f():\n    """Doc."""\n    return x\n'
    file.write_text(f'"""Doc\n\nmore.\n"""\n\n# why\nx = (\n    1\n)\n\n\n{function}')
    assert code_lines(file) == 5


def method_files():
    return sorted((SRC / "methods").glob("[!_.]*.py"))


def test_there_are_methods():
    assert {"lora", "smora", "moe_lora"} <= {path.stem for path in method_files()}


def test_registered_names_are_the_files():
    from polyrank.frame import registry

    assert {path.stem.replace("_", "-") for path in method_files()} <= set(registry.names())


@pytest.mark.parametrize("path", method_files(), ids=lambda path: path.stem)
def test_file_stem_is_the_registered_name(path):
    from polyrank.frame import registry

    name = path.stem.replace("_", "-")
    found = registry.get(name)
    assert found.name == name
    assert found.__module__ == f"polyrank.methods.{path.stem}"


HEADINGS = ("Idea:", "Maths:", "Source:", "Differs from the released code:", "Limits:")


@pytest.mark.parametrize("path", method_files(), ids=lambda path: path.stem)
def test_method_docstring_has_the_five_headings(path):
    lines = (ast.get_docstring(tree(path)) or "").splitlines()
    found = [heading for heading in HEADINGS if any(line.startswith(heading) for line in lines)]
    assert found == list(HEADINGS)


def limit(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] == "src" and path.name != "__init__.py" and parts[2] in CODE_LINES:
        return CODE_LINES[parts[2]]
    return CODE_LINES[parts[0]]


def too_long():
    """Files and functions above their limit, by name, with what they measure."""
    found = {}
    for path in [*sources(SRC), *sources(TESTS)]:
        name = str(path.relative_to(ROOT))
        size = len(path.read_text(encoding="utf-8").splitlines())
        if size > limit(path):
            found[name] = f"{size} lines, expected <= {limit(path)}"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size > FUNCTION_LINES:
                    found[f"{name}:{node.name}"] = f"{size} lines, expected <= {FUNCTION_LINES}"
    return found


def test_files_and_functions_are_short_or_say_why_not():
    found = too_long()
    assert {name: text for name, text in found.items() if name not in LONGER} == {}
    assert set(LONGER) <= set(found), "no longer too long: take it out of LONGER"
    assert all(len(reason.split()) > 3 for reason in LONGER.values())
