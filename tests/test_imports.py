"""Who imports whom, and that importing does no work. Run: sh tests/run.sh tests/test_imports.py"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# package -> what of ours it may import besides itself. Scripts (train.py, test.py, and SCRIPTS below) may import anything.
MAY_IMPORT = {
    "config": [],
    "visual": ["config"],
    "qwen": ["config"],
    "demo": ["config"],
    "model": ["config", "visual", "qwen"],
    "dataset": ["config", "visual.images"],
    "dataprocess": [
        *("config", "dataset.record", "dataset.json_stream"),
        *("visual.images", "visual.archives", "visual.image_pack"),
    ],
    "evaluation": ["config", "dataset", "model", "visual"],
    "training": ["config", "dataprocess", "dataset", "visual", "qwen", "model", "evaluation"],
}
# modules that are run with `python -m`: they read the whole config, and may import upward
SCRIPTS = {"dataprocess.process_image", "dataprocess.train_tokenizer", "dataset.show", "demo.emoji_report"}
SCRIPTS |= {"model.export.__main__", "model.export.samples", "model.import_checkpoint"}
SCRIPTS |= {"model.loaded"}  # `model.load`
ROOT_MODULES = {"train", "test"}
# other people's libraries that a package must not import, directly or through ours: the config and data preparation start
# fast, and only the model's side knows a model library
MUST_NOT_IMPORT = {
    "config": {"torch", "transformers", "peft", "accelerate", "numpy"},
    "dataprocess": {"torch", "transformers", "peft", "accelerate"},
    "dataset": {"transformers", "peft", "accelerate"},
    "evaluation": {"accelerate"},
    "visual": {"peft", "accelerate"},
    "qwen": {"peft", "accelerate"},
    "model": {"accelerate"},
}
# the config sections that builders below training/ may take; a whole Config is for training/ and the scripts
SECTIONS = {
    f"config.{name}Config"
    for name in ("Source", "Columns", "Augment", "Data", "Model", "Scratch", "Lora", "Trainable", "Train")
}
UNSAFE_NAMES = {"torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"}


def packages() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")


@cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the repository except tests: dotted name -> syntax tree."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(path for name in packages() for path in (ROOT / name).rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(module: str) -> set[str]:
    """Return the dotted names that a module imports, inside functions too; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def of_ours(names: set[str]) -> set[str]:
    """Return the modules of the repository among `names`, without the package of a module that is named."""
    known = {name for name in names if name in modules()}
    return {name for name in known if not any(other.startswith(name + ".") for other in known)}


def within(name: str, allowed: list[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def test_every_package_has_a_rule():
    assert set(packages()) - {"benchmarks"} == set(MAY_IMPORT)  # a benchmark may import anything
    assert {module for module in modules() if "." not in module} - set(packages()) == ROOT_MODULES


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_it_may(package):
    wrong = {
        f"{module} imports {name}"
        for module in modules()
        if within(module, [package]) and module not in SCRIPTS
        for name in of_ours(imported(module))
        if not within(name, [package, *MAY_IMPORT[package]])
    }
    assert wrong == set()


def test_no_import_cycles():
    """Imports inside functions count too. A package and its modules are different nodes."""
    graph = {module: of_ours(imported(module)) - {module} for module in modules()}
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for name in sorted(graph[module]):
            visit(name)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("part", MUST_NOT_IMPORT)
def test_package_does_without_unneeded_libraries(part):
    """Also through modules of ours that it imports."""
    reached, waiting = set(), [module for module in modules() if within(module, [part]) and module not in SCRIPTS]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [*of_ours(imported(module)), *(name for name in [module.rpartition(".")[0]] if name)]
    wrong = {
        f"{module} imports {name}"
        for module in reached
        for name in imported(module)
        if name.split(".")[0] in MUST_NOT_IMPORT[part]
    }
    assert wrong == set()


def test_only_training_and_the_scripts_see_a_whole_config():
    wrong = {
        f"{module} imports {name}"
        for module in modules()
        if "." in module and module not in SCRIPTS and not within(module, ["benchmarks", "config", "training"])
        for name in imported(module)
        if name == "config.load_config" or name.startswith("config.") and name.endswith("Config")
        if name not in SECTIONS
    }
    assert wrong == set()


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return [name for name in names if name not in ("self", "cls", "ctx")]


# functions whose signature a library demands
LIBRARY_SIGNATURES = {
    ("qwen.attention", "packed_sdpa"),  # transformers' AttentionInterface
    ("qwen.injection", "forward"),  # transformers' models
    ("qwen.modeling", "forward"),
}


def test_no_function_takes_more_than_seven_parameters():
    long = {
        (module, node.name)
        for module, tree in modules().items()
        if not within(module, ["benchmarks"])
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(parameters(node)) > 7
    }
    assert long == LIBRARY_SIGNATURES


# formulas on tensors, and a plotting helper in matplotlib's style
POSITIONAL = {"model.fused_lora", "training.curves"}


def test_arguments_beyond_the_third_are_named():
    """In calls of our own functions and classes by their names."""
    ours = {
        node.name
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    } - {"zip"}
    long = {
        f"{module} line {node.lineno}: {node.func.id}"
        for module, tree in modules().items()
        if not within(module, ["benchmarks"]) and module not in POSITIONAL
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ours
        if len([argument for argument in node.args if not isinstance(argument, ast.Starred)]) > 3
    }
    assert long == set()


def private_reaches(tree: ast.Module) -> set[str]:
    """Attributes `x._name` of objects other than self, cls and ctx that a class of the repository assigns."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "ctx"))
    }


def own_private_attributes(tree: ast.Module) -> set[str]:
    """Attributes `self._name` that a module's classes assign, and their private methods."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {
                item.name for item in node.body if isinstance(item, ast.FunctionDef) and item.name.startswith("_")
            }
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    if isinstance(inner.value, ast.Name) and inner.value.id == "self" and inner.attr.startswith("_"):
                        found.add(inner.attr)
    return {name for name in found if not name.startswith("__")} - {"_replace"}  # a NamedTuple's public method


def test_no_private_attribute_of_another_class_is_used():
    """Private attributes of our classes are used by their own module alone; other libraries' are listed where they are
    used."""
    ours = {name: module for module, tree in modules().items() for name in own_private_attributes(tree)}
    wrong = {
        f"{module} uses .{name} of {ours[name]}"
        for module, tree in modules().items()
        for name in private_reaches(tree)
        if name in ours and name not in own_private_attributes(tree)
    }
    assert wrong == set()


def unsafe(tree: ast.Module) -> set[str]:
    """Return whatever in a module could run code from a file that it reads."""
    found = set()
    restricted = set()  # torch.load of tensors only, which runs no code of the file
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and any(
            word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
            for word in node.keywords
        ):
            restricted.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names}
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for source in names if module is None else {module}:
                if source.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
                    found |= {f"{source}: {name}" for name in names - {"UnpicklingError"}}
            if module == "torch" and names & {"load", "save"}:
                found.add("torch.load")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in UNSAFE_NAMES:
                found.add(f"{name}, weights only" if node in restricted else name)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.add(node.func.id)
            for word in node.keywords:
                is_false = isinstance(word.value, ast.Constant) and word.value.value is False
                if word.arg in ("trust_remote_code", "allow_pickle") and not is_false:
                    found.add(word.arg)
    return found


def test_no_module_unpickles_or_executes_files():
    found = {module: unsafe(tree) for module, tree in modules().items() if unsafe(tree)}
    # a file of a package, whose SHA-256 is known, and other projects' checkpoints, with PyTorch's reader of tensors only
    assert found == dict.fromkeys(["demo.real_parts", "model.foreign"], {"torch.load, weights only"})


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "from torch import load", "torch.load(path)", "eval(text)",
        "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)", "import joblib as j", "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
    ],
)  # fmt: skip
def test_unsafe_code_is_found(line):
    assert unsafe(ast.parse(line))
    assert not unsafe(ast.parse("model.eval(); f(trust_remote_code=False); from pickle import UnpicklingError"))


# Imports the libraries, forbids what an import must not do, then imports each named module alone in a child process.
IMPORT_EACH = """
import os, sys, traceback
root, here, *names = sys.argv[1:]
import accelerate, numpy, peft, safetensors.numpy, safetensors.torch, sklearn, torch, torch.utils.data, transformers

def forbidden(*args, **kwargs):
    raise PermissionError("weights are read")

safetensors.safe_open = safetensors.torch.load_file = safetensors.numpy.load_file = torch.load = forbidden
for cls in (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, transformers.AutoTokenizer,
            transformers.AutoModel, transformers.AutoModelForCausalLM, transformers.AutoConfig):
    cls.from_pretrained = forbidden

def guard(event, args):
    if event.startswith("socket.") and event != "socket.__new__" and event != "socket.gethostname":
        raise PermissionError(event)
    if event == "subprocess.Popen" or event == "os.system":
        raise PermissionError(event)
    if event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and "__pycache__" not in args[0]:
        if set(args[1]) & set("wax+") and args[0] != os.devnull:
            raise PermissionError("writes " + args[0])

for name in names:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.path[:0] = [root, here]
        sys.addaudithook(guard)
        try:
            __import__(name)
            print("imported", name)
        except BaseException as error:
            print("failed", name, type(error).__name__, error)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""

GUILTY = {
    "guilty_network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "guilty_weights": "from safetensors.torch import load_file; load_file('x.safetensors')",
    "guilty_writer": "open('x.txt', 'w')",
    "guilty_path": "import no_such_module",
}


def test_importing_a_module_loads_no_weights_and_touches_no_network(tmp_path):
    """Each module is imported alone, with only the repository's root on the path, from another working folder. Modules
    that do what is forbidden show that the guards work."""
    for name, code in GUILTY.items():
        (tmp_path / f"{name}.py").write_text(code + "\n")
    names = [*modules(), *GUILTY]
    ran = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", IMPORT_EACH, str(ROOT), str(tmp_path), *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    lines = ran.stdout.splitlines()
    assert [line for line in lines if line.startswith("imported")] == [f"imported {name}" for name in modules()], (
        ran.stdout + ran.stderr
    )
    assert [line.split()[1] for line in lines if line.startswith("failed")] == list(GUILTY)
