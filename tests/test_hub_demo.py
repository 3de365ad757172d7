"""Publishing the page in demo/ as a static Space of the Hub, with the real client and a local Hub."""

import json
import shutil
from pathlib import Path

import pytest
from hub_fixtures import Push, commit_all, git, refused, sha256
from hub_server import HubServer
from hub_state import Repository
from huggingface_hub import SpaceCard
from paths import REPOSITORY
from tiny_models import byte_model, byte_tokenizer

pytest_plugins = "hub_fixtures"

LIBRARIES = {"library.min.js": b"export {};", "runtime.wasm": b"\0asm" * 1000}
MODEL_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with the page, and its libraries, which git doesn't track."""
    folder = tmp_path_factory.mktemp("sites")
    git(folder, "clone", "--quiet", str(root), "site")
    site = folder / "site"
    vendor = site / "demo/vendor"
    vendor.mkdir(parents=True)
    for name in git(REPOSITORY, "ls-files", "demo").split():
        shutil.copy(REPOSITORY / name, site / "demo")
    for name, content in LIBRARIES.items():
        (vendor / name).write_bytes(content)
    (site / "demo/vendor.sha256").write_text("".join(f"{sha256(vendor / name)}  {name}\n" for name in LIBRARIES))
    commit_all(site)
    return site


@pytest.fixture(scope="module")
def onnx(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ONNX form of the model as `export` writes it, but with other bytes as graphs, which nothing opens here."""
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    model = byte_model()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_bytes(b"fp32")
    (folder / "onnx/model_quantized.onnx").write_bytes(b"q8")
    (folder / "README.md").write_text("# ONNX\n")
    base = {"model": str(site), "sha256": sha256(site / "model.safetensors")}
    (folder / "report.json").write_text(json.dumps({"base": base}))
    return folder


@pytest.fixture(scope="module")
def space(hub: HubServer, push: Push, site: Path, onnx: Path) -> Repository:
    done = push("lab/tiny", "--demo", onnx, "--tag", "v1.0.0", root=site)
    assert done.returncode == 0, done.stderr
    space = hub.repositories["spaces/lab/tiny-demo"]
    assert f"{hub.origin}/spaces/lab/tiny-demo: revision {space.head}\n" in done.stderr
    return space


def test_the_page_is_published_with_its_libraries_and_its_model(space: Repository, site: Path, onnx: Path) -> None:
    page = {name: site / "demo" / name for name in git(site / "demo", "ls-files").split()}
    libraries = {f"vendor/{name}": site / "demo/vendor" / name for name in LIBRARIES}
    model = {f"model/{name}": onnx / name for name in (*MODEL_FILES, "onnx/model_quantized.onnx")}
    expected = {name: path.read_bytes() for name, path in {**page, **libraries, **model}.items()}
    assert space.files.keys() == expected.keys() >= {"index.html", "worker.js"}
    assert {name for name in expected if space.files[name] != expected[name]} == {"README.md"}


def test_the_card_says_how_to_serve_the_space_and_names_the_model(space: Repository) -> None:
    card = SpaceCard(space.files["README.md"].decode())
    assert (card.data.sdk, card.data.app_file, card.data.models) == ("static", "index.html", ["lab/tiny"])
    assert "https://huggingface.co/lab/tiny/blob/main/docs/demo.md" in card.text


def test_the_space_is_private_tagged_and_in_the_collection(hub: HubServer, space: Repository) -> None:
    assert space.private
    assert space.tags == {"v1.0.0": space.head}
    assert len(space.commits) == 2  # the Hub's, with a page to start with, and ours
    (collection,) = hub.collections.values()
    items = [(item["type"], item["id"]) for item in collection["items"]]
    assert items == [("model", "lab/tiny"), ("space", "lab/tiny-demo")]


def test_pushing_the_same_again_changes_nothing(space: Repository, push: Push, site: Path, onnx: Path) -> None:
    done = push("lab/tiny", "--demo", onnx, "--tag", "v1.0.0", root=site)
    assert done.returncode == 0, done.stderr
    assert len(space.commits) == 2


def test_a_dry_run_lists_the_files_of_the_space(push: Push, site: Path, onnx: Path) -> None:
    done = push("lab/dry", "--demo", onnx, "--dry-run", root=site, HF_TOKEN="")
    _, listed = done.stdout.split("\n\n")
    assert listed.startswith("lab/dry-demo (static Space, private): ")
    weights = onnx / "onnx/model_quantized.onnx"
    assert f"{2:>13}  {sha256(weights)}  model/onnx/model_quantized.onnx" in listed.splitlines()


def test_a_push_that_failed_after_the_space_was_created_is_repeated(
    hub: HubServer, push: Push, site: Path, onnx: Path
) -> None:
    hub.faults["POST commit"] = [None, 500]  # that of the model succeeds
    command = ("lab/late", "--demo", onnx)
    assert "lab/late-demo: the Hub answered 500" in push(*command, root=site).stderr
    space = hub.repositories["spaces/lab/late-demo"]
    assert space.files["index.html"] == b"<p>Welcome</p>"
    done = push(*command, root=site)
    assert done.returncode == 0, done.stderr
    assert space.files["index.html"] == (site / "demo/index.html").read_bytes()


def test_another_space_is_replaced_only_on_request(hub: HubServer, push: Push, site: Path, onnx: Path) -> None:
    space = hub.add_repository("spaces/lab/other-demo", files={"app.py": b"print()"})
    done = push("lab/other", "--demo", onnx, root=site)
    assert done.returncode == 1
    assert done.stderr.startswith("error: lab/other-demo: exists already with other files")
    assert space.files.keys() == {"app.py"} | {"README.md", "index.html", "style.css"}
    assert "lab/other" not in hub.repositories
    done = push("lab/other", "--demo", onnx, "--replace", root=site)
    assert done.returncode == 0, done.stderr
    assert "app.py" not in space.files
    assert "worker.js" in space.files


@pytest.mark.parametrize("content", [None, b"changed"])
def test_libraries_have_to_be_fetched_first(content: bytes | None, site: Path, onnx: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(site, tmp_path / "site")
    library = copy / "demo/vendor/runtime.wasm"
    library.unlink() if content is None else library.write_bytes(content)
    message = f"{library}: missing or changed: delete {library.parent} and run `make demo/vendor`"
    assert refused(copy, demo=onnx) == message


def test_a_folder_that_is_no_onnx_form_is_refused(site: Path, onnx: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(onnx, tmp_path / "export")
    shutil.rmtree(copy / "onnx")
    assert f"{copy}: no onnx/model_quantized.onnx: the page needs" in refused(site, demo=copy)


def test_an_onnx_form_of_other_weights_is_refused(site: Path, onnx: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(onnx, tmp_path / "export")
    (copy / "report.json").write_text(json.dumps({"base": {"model": "other", "sha256": 64 * "0"}}))
    assert f"{copy}: made from other weights" in refused(site, demo=copy)
