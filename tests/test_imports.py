"""The house's one arrow direction, and what `import sjd_engine` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAMILIES = ("emoji", "anole", "lumina", "janus", "simplear", "llamagen", "emu3")

# Who may import what of this project, lowest first; a module may import from its own level and from those above it.
LEVELS = [
    {"sjd_engine.kernels", "sjd_engine._C", "sjd_engine.errors", "sjd_engine.files"},
    {"sjd_engine.native"},
    {"sjd_engine.attention"},
    {"sjd_engine.ops", "sjd_engine.sampling", "sjd_engine.methods", "sjd_engine.images"},
    {"sjd_engine.schedule", "sjd_engine.kv_cache", "sjd_engine.denoise"},
    {"sjd_engine.drafting"},
    {"sjd_engine.neighbours"},
    {"sjd_engine.decoder", "sjd_engine.models", "sjd_engine.zipar", "sjd_engine.hf_cache"},
    {"sjd_engine.sjd2"},
    {"sjd_engine.outputs", "sjd_engine.request", "sjd_engine.parallel", "sjd_engine.quantize", "sjd_engine.pack"},
    {"sjd_engine.loading"},
    {"sjd_engine.graph", "sjd_engine.prompt_cache", "sjd_engine.eagle", "sjd_engine.auto_window", "sjd_engine.train"},
    {"sjd_engine.batch"},
    {"sjd_engine.scheduler"},
    {"sjd_engine.engine"},
    {"sjd_engine.pipeline"},
    {"sjd_engine", "sjd_engine.hf", "sjd_engine.options", "sjd_engine.statistics", "sjd_engine.testing"},
    {"sjd_engine.lossless", "sjd_engine.recipe", "sjd_engine.trajectory"},
    {"sjd_engine.evaluate", "sjd_engine.plot", "sjd_engine.scale_out", "sjd_engine.serve"},
    {"sjd_engine.cli", "sjd_engine.integrations"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def room(module: str) -> str:
    """The longest listed name that holds `module`."""
    parts = module.split(".")
    return next(name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in LEVEL_OF)


def imports(path: Path, package: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            names.add(".".join(filter(None, (base, node.module))))
            names |= {".".join(filter(None, (base, node.module, alias.name))) for alias in node.names}
    return names


def modules() -> list[tuple[str, Path, str]]:
    found = [(f"sjd_engine.kernels.{p.stem}", p, "sjd_engine.kernels") for p in (ROOT / "kernels").glob("*.py")]
    for path in (ROOT / "sjd_engine").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append((name, path, name if path.stem == "__init__" else name.rpartition(".")[0]))
    return found


def test_data_flows_one_way():
    for name, path, package in modules():
        for imported in imports(path, package):
            if imported.startswith("sjd_engine.") and room(imported) != room(name):
                assert LEVEL_OF[room(imported)] <= LEVEL_OF[room(name)], f"{name} imports {imported}"


def test_only_ops_and_what_it_chooses_from_import_the_kernels():
    for name, path, package in modules():
        if room(name) not in ("sjd_engine.ops", "sjd_engine.attention", "sjd_engine.native", "sjd_engine.kernels"):
            assert not any(i.startswith("sjd_engine.kernels") for i in imports(path, package)), name


def test_kernels_import_nothing_but_torch_triton_and_numpy():
    allowed = {"torch", "triton", "numpy", "sjd_engine.kernels", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").glob("*.py"):
        for imported in imports(path, "sjd_engine.kernels"):
            assert any(imported == name or imported.startswith(name + ".") for name in allowed), (path, imported)


def test_import_loads_little_beyond_torch_and_numpy():
    """Two packages and a progress bar; of this one neither the families, nor what is written in Triton, nor the CLI."""
    code = """if True:
        import sys, torch, numpy
        before = set(sys.modules)
        import sjd_engine
        print(*set(sys.modules) - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    packages = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert "sjd_engine" in packages <= {"sjd_engine", "PIL", "safetensors", "tqdm"}
    later = {"sjd_engine.cli", "sjd_engine.kernels.verify", "sjd_engine.kernels.attention"}
    later |= {"sjd_engine.kernels.denoise", "sjd_engine.train"}
    later |= {f"sjd_engine.models.{family}" for family in FAMILIES}
    assert not loaded & later


def test_only_native_imports_the_compiled_module():
    for name, path, package in modules():
        if name != "sjd_engine.native":
            assert "sjd_engine._C" not in imports(path, package), name
