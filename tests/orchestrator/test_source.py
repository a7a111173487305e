"""The source that an outcome follows from: all of it, and no file of a method or data set that has no part in it."""

import ast
import dataclasses
import shutil
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import cavs_model
from cavs_model.datasets.avsbench import AVSBench
from cavs_model.datasets.tones import Tones
from cavs_model.evaluate import Data, EvaluateJob, ScoreJob
from cavs_model.methods.cmr import CMR
from cavs_model.methods.ewc import EWC
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.replay import Replay
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule, Seeds, TaskJob
from cavs_model.types import AUDIO_VISUAL
from orchestrator import source
from orchestrator.source import code_of, code_version
from orchestrator.store import evaluate_key, score_key, train_key

SOURCE = Path(cavs_model.__file__).parent


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the science's source that a test may edit."""
    root = shutil.copytree(SOURCE, tmp_path / "cavs_model", ignore=shutil.ignore_patterns("collage_pack", "__pycache__"))
    monkeypatch.setattr(cavs_model, "__file__", str(root / "__init__.py"))
    forget()
    yield root
    forget()


def forget():
    source._reached.cache_clear()
    source._digest.cache_clear()


def edited(path):
    """Another text in that file, new or not, as the next process sees it."""
    path.write_text((path.read_text() if path.exists() else "") + "\n# edited\n")
    forget()


def files_of(*used):
    """The files whose edit changes `code_of(*used)`, as paths in the package."""
    root = Path(cavs_model.__file__).parent
    found = set()
    for path in sorted(root.rglob("*.py")):
        text, before = path.read_text(), code_of(*used)
        path.write_text(text + "\n# edited\n")  # as a comment it changes no import
        source._digest.cache_clear()
        if code_of(*used) != before:
            found.add(str(path.relative_to(root)))
        path.write_text(text)
        source._digest.cache_clear()
    return found


def test_only_the_methods_and_data_sets_in_use_count(copy):
    every = {str(path.relative_to(copy)) for path in copy.rglob("*.py")}
    common = {name for name in every if not name.startswith(("methods/", "datasets/"))} | {
        "methods/__init__.py", "methods/base.py", "datasets/__init__.py", "datasets/base.py", "datasets/cache.py",
        "datasets/log_mel.py",
    }  # fmt: skip
    assert {"train.py", "networks/av_segmenter.py", "losses.py"} < common < every
    assert files_of() == common
    assert files_of(Tones()) == common | {"datasets/tones.py"}
    assert files_of(Tones(), Finetune()) == common | {"datasets/tones.py", "methods/finetune.py"}
    assert files_of(AVSBench(root="/")) == common | {"datasets/avsbench.py", "datasets/clip_files.py"}


def test_what_a_method_builds_on_counts(copy):
    """CMR imports PLOP, which imports MiB; by its field it may build on another, which CMR's file does not know."""
    cmr = files_of(CMR()) - files_of()
    assert cmr == {f"methods/{name}.py" for name in ("cmr", "finetune", "mib", "plop", "replay")}
    assert files_of(CMR(base=EWC())) - files_of() == cmr | {"methods/ewc.py"}


def test_a_new_file_of_a_method_changes_no_address(copy):
    tones = Tones()
    base, task = Scenario(setting="2-2").tasks(tones)
    data = Data(tones, "cache", tones.class_names())
    network = NetworkConfig(visual_weights="none")
    first = TaskJob(AUDIO_VISUAL, base, data, (), Finetune(), network, Schedule(), "fp32", Seeds(0, 0, 0), None)
    later = dataclasses.replace(first, task=task, method=Replay(), start="networks/abc")
    score = ScoreJob("after", CMR(), task, data, 16, "fp32")
    evaluate = EvaluateJob("val", ("val-1",), task.seen_rule, 5, data, 16, "fp32")

    def addresses():
        return train_key(first), train_key(later), score_key(score, {AUDIO_VISUAL: "n/a"}), evaluate_key(evaluate, "n/a")

    before, whole = addresses(), code_version()
    edited(copy / "methods/new.py")
    edited(copy / "datasets/new.py")
    assert addresses() == before
    assert code_version() != whole
    edited(copy / "methods/replay.py")  # CMR draws as replay does; the base task and counts have no part in it
    assert [now == then for now, then in zip(addresses(), before, strict=True)] == [True, False, False, True]
    edited(copy / "losses.py")
    assert not set(addresses()) & set(before)


@pytest.mark.parametrize(
    "statement",
    ["import cavs_model.methods.ewc", "from cavs_model.methods import ewc", "from cavs_model.methods.ewc import EWC",
     "from . import ewc", "from .ewc import EWC", "def f():\n    from ..methods.ewc import EWC"],
)  # fmt: skip
def test_every_form_of_import_is_followed(copy, statement):
    (copy / "methods/finetune.py").write_text(statement)
    forget()
    assert "methods/ewc.py" in files_of(Finetune())
    assert "methods/ewc.py" not in files_of(Tones())


def test_a_name_counts_like_a_text(copy):
    before = code_of()
    (copy / "losses.py").rename(copy / "loss.py")
    forget()
    assert code_of() != before


@dataclass(frozen=True)
class Elsewhere(Finetune):
    """A method that stands in no file of cavs_model."""


def test_a_file_outside_of_the_package_counts(copy, tmp_path, monkeypatch):
    assert code_of(Elsewhere()) != code_of(Finetune())
    mine = tmp_path / "mine.py"
    mine.write_text("x = 1")
    monkeypatch.setattr(sys.modules[__name__], "__file__", str(mine))
    before = code_of(Elsewhere())
    edited(mine)
    assert code_of(Elsewhere()) != before


HELPERS = {
    "mine.py": """
        import helper, json
        from tools.maths import f
        from cavs_model.methods.plop import PLOP
        from cavs_model.methods.finetune import Finetune

        try:
            from . import never
        except ImportError:
            pass

        class Mine(Finetune):
            def loss(self, step):
                import late
    """,
    "helper.py": "import deeper\nfrom orchestrator import stream",
    "deeper.py": "import helper  # in a circle",
    "late.py": "",
    "tools/__init__.py": "",
    "tools/maths.py": "from .more import f",
    "tools/more.py": "import beside\nf = 1",
    "beside.py": "",
    "unused.py": "",
    "tools/unused.py": "",
    "orchestrator/stream.py": "",
    "json/__init__.py": "",  # what lies beside may be what is imported
}


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    forget()


def matter(folder, thing):
    """The files below a folder whose edit changes `code_of` of a thing."""
    found = set()
    for path in sorted(folder.rglob("*.py")):
        text, before = path.read_text(), code_of(thing)
        edited(path)
        if code_of(thing) != before:
            found.add(str(path.relative_to(folder)))
        path.write_text(text)
        forget()
    return found


def thing_of(monkeypatch, name, path):
    """A method whose class stands in the module `name`, that was loaded from `path`."""
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__file__=str(path)))
    return type("Mine", (Finetune,), {"__module__": name})()


def test_what_a_file_outside_imports_from_beside_it_counts(tmp_path, monkeypatch):
    written(tmp_path, HELPERS)
    expected = {"mine.py", "helper.py", "deeper.py", "late.py", "tools/__init__.py", "tools/maths.py", "tools/more.py"}
    for name in ("mine", "__main__"):
        mine = thing_of(monkeypatch, name, tmp_path / "mine.py")
        assert matter(tmp_path, mine) == expected | {"beside.py", "json/__init__.py"}
        assert code_of(mine) != code_of(thing_of(monkeypatch, name, tmp_path / "unused.py"))


def test_what_a_file_outside_imports_of_the_science_counts(copy, tmp_path, monkeypatch):
    written(tmp_path / "elsewhere", {"mine.py": "import helper", "helper.py": "from cavs_model.methods import ewc"})
    mine = thing_of(monkeypatch, "mine", tmp_path / "elsewhere" / "mine.py")
    assert "methods/ewc.py" in files_of(mine)
    assert "methods/ewc.py" not in files_of(Finetune())


def test_of_a_package_outside_its_own_files_count(tmp_path, monkeypatch):
    written(
        tmp_path,
        {
            "theirs/__init__.py": "from theirs import common",
            "theirs/common.py": "",
            "theirs/methods/mine.py": "from ..common import f\nfrom . import helper\nimport theirs.more.deep\nimport outside",
            "theirs/methods/helper.py": "",
            "theirs/more/deep.py": "",
            "theirs/unused.py": "",
            "outside.py": "",
        },
    )
    used = {"common.py", "methods/mine.py", "methods/helper.py", "more/deep.py"}
    mine = thing_of(monkeypatch, "theirs.methods.mine", tmp_path / "theirs/methods/mine.py")
    assert matter(tmp_path, mine) == {f"theirs/{name}" for name in used | {"__init__.py"}}
    whole = thing_of(monkeypatch, "theirs", tmp_path / "theirs/__init__.py")
    assert matter(tmp_path, whole) == {"theirs/__init__.py", "theirs/common.py"}


def test_what_is_installed_beside_a_file_does_not_count(tmp_path, monkeypatch):
    folder = tmp_path / "lib/site-packages"
    written(
        folder, {"mine.py": "import helper", "helper.py": "", "theirs/mine.py": "from . import helper", "theirs/helper.py": ""}
    )
    assert matter(folder, thing_of(monkeypatch, "mine", folder / "mine.py")) == {"mine.py"}
    assert matter(folder, thing_of(monkeypatch, "theirs.mine", folder / "theirs/mine.py")) == {"theirs/mine.py"}


def test_the_science_imports_by_statements_alone():
    """What `code_of` relies on: it could not follow a module that is named at run time."""
    for path in SOURCE.rglob("*.py"):
        names = {
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(ast.parse(path.read_bytes()))
            if isinstance(node, ast.Name | ast.Attribute)
        }
        assert not names & {"importlib", "__import__", "import_module", "exec"}, path
