"""Wheel, sdist and editable install: what a user gets has everything in it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import agln_fast
from agln_fast.models.shipped import list_checkpoints

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist, the wheel built from the sdist as a package index would."""
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "checkout"
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def _modules() -> list[str]:
    found = []
    for folder, package in (
        ("agln_fast", "agln_fast"),
        *((n, f"agln_fast.{n}") for n in ("kernels", "export", "bench")),
    ):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not (file.parent / "__init__.py").exists():
                continue  # pytest's files in bench/suite/ are no part of the package
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return found


def test_wheel_works_outside_the_checkout(distributions, tmp_path):
    """A fresh environment that sees the dependencies but not the checkout: modules import, the command answers."""
    wheel, _ = distributions
    venv.create(tmp_path / "env", with_pip=True, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, cwd=tmp_path)
    here = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # The dependencies alone: a .pth file of the outer environment's packages would bring the editable checkout along.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    script = (
        f"import sys; sys.path += {dependencies!r}\n"
        "import importlib\n"
        f"for name in {_modules()!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({here!r}), module.__file__\n"
        "assert importlib.import_module('agln_fast').list_models('agln_lite*')\n"
    )
    subprocess.run([python, "-c", script], check=True, cwd=tmp_path)
    environment = {"PYTHONPATH": ":".join(dependencies), "PATH": "/usr/bin:/bin"}
    command = [tmp_path / "env" / "bin" / "agln-fast", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert "doctor" in answer.stdout


def test_wheel_and_sdist_hold_every_module_and_data_file(distributions):
    wheel, sdist = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"{module.replace('.', '/')}.py" for module in _modules()}
    packages = {f"{module.replace('.', '/')}/__init__.py" for module in _modules()}
    assert not {name for name in expected if name not in names and name[:-3] + "/__init__.py" not in packages & names}
    for data in ("ade20k.json", "pascal_voc.json", "manifest.schema.json"):
        assert f"agln_fast/data/{data}" in names
    assert "agln_fast/serving/page.html" in names
    for name in (*list_checkpoints(), "README"):
        assert {f"agln_fast/checkpoints/{name}.safetensors", f"agln_fast/checkpoints/{name}.md"} & names
    assert not [name for name in names if name.split("/")[0] in ("kernels", "export", "bench", "tests")]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "kernels/__init__.py", "agln_fast/builder/build.py", "LICENSE"} <= inside


def test_editable_install_points_into_the_checkout():
    import agln_fast.kernels

    assert Path(agln_fast.kernels.__file__) == ROOT / "kernels" / "__init__.py"


def test_public_names_exist_and_importing_is_light():
    for name in agln_fast.__all__:
        assert getattr(agln_fast, name) is not None
    assert set(agln_fast.__all__) <= set(dir(agln_fast))
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        _ = agln_fast.biuld
    heavy = "{'torch', 'triton', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'matplotlib'}"
    code = f"import sys, agln_fast; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def _required(extra: str | None) -> list[Requirement]:
    """What is named in pyproject.toml for an extra, or for all, those of our own extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.name == "agln-fast":
            found += [each for inner in requirement.extras for each in _required(inner)]
        else:
            found.append(requirement)
    return found


def test_what_is_pinned_is_within_the_bounds_and_the_lowest_is_each_bound_itself():
    """`make test-lowest` installs the oldest version of everything that the metadata names a bound for."""
    newest, lowest = _pins("constraints.txt"), _pins("constraints-lowest.txt")
    for requirement in [*_required(None), *_required("dev")]:
        name = canonicalize_name(requirement.name)
        assert newest[name] in requirement.specifier, name
        assert lowest[name] in requirement.specifier, name
        for bound in requirement.specifier:
            assert bound.operator != ">=" or Version(lowest[name]).release[: len(Version(bound.version).release)] == (
                Version(bound.version).release
            ), name
