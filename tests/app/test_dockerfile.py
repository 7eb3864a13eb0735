"""The Dockerfile names files, an extra and options that exist. It is not built here, which needs Docker."""

import configparser
import fnmatch
import json
import re

from helpers import ROOT

from tcl_hf.cli import serve


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def values_of(name: str) -> list[str]:
    return [value for instruction, value in instructions() if instruction == name]


def test_what_is_copied_is_there_and_is_sent_to_docker():
    sources = [source for value in values_of("COPY") for source in value.split()[:-1]]
    sent = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    assert {"setup.cfg", "pyproject.toml", "tcl_hf"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and any(fnmatch.fnmatch(source, pattern) for pattern in sent), source
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    modules = setup["options"].get("py_modules", "").split()
    assert {f"{module}.py" for module in modules} <= set(sources)
    assert (
        setup["metadata"]["license_files"] in sources and setup["metadata"]["long_description"].split()[-1] in sources
    )


def test_the_extra_and_the_interpreter_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    (extra,) = re.findall(r'"\.\[(\w+)\]"', " ".join(values_of("RUN")))
    assert extra in setup["options.extras_require"]
    (version,) = re.findall(r"python:(3\.\d+)", values_of("FROM")[0])
    assert f"Python :: {version}\n" in setup["metadata"]["classifiers"] + "\n"


def test_its_command_is_one_that_the_service_takes():
    (entry,), (command,) = values_of("ENTRYPOINT"), values_of("CMD")
    name, subcommand, *argv = [*json.loads(entry), *json.loads(command)]
    args = serve.parser().parse_args(argv)
    assert (name, subcommand) == ("tcl-hf", "serve")
    assert args.host == "0.0.0.0" and str(args.port) in values_of("EXPOSE") and args.model == ["/models"]
    assert f":{args.port}/health" in values_of("HEALTHCHECK")[0] and values_of("USER") == ["tcl"]
    assert serve.TOKEN in (ROOT / "Dockerfile").read_text()
