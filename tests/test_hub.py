"""Publishing on the Hub and loading from it by name, with the real client and a local Hub."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clean_process import result_of, start_clean_process
from conftest import REPOSITORY, RunScript
from hub_server import HubServer, serving_hub
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import LoraConfig, get_peft_model
from tiny_models import byte_model, byte_tokenizer, llama_twin, random_ids

from healthslm.errors import UserError
from healthslm.finetuning.card import Card, write_card
from healthslm.hub.options import PushOptions
from healthslm.hub.publish import push_to_hub

TOKEN = "hf_" + "Secret" * 6
READ_TOKEN = "hf_" + "Reader" * 6
MODEL = "lab/tiny"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"

Push = Callable[..., subprocess.CompletedProcess[str]]


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def commit_all(root: Path) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "A change")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_model(root: Path, model: torch.nn.Module) -> None:
    """Save a model in a model repository, with results that belong to it."""
    model.save_pretrained(root)
    results = json.loads((REPOSITORY / "results/pubmedqa.json").read_text())
    results["inputs"]["model"] = sha256(root / "model.safetensors")
    (root / "results").mkdir(exist_ok=True)
    (root / "results/pubmedqa.json").write_text(json.dumps(results))


def changed_model() -> torch.nn.Module:
    model = byte_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1)
    return model


def adapted_model() -> torch.nn.Module:
    """A model with an adapter that changes its output."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(byte_model(), config).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of a model repository with a tiny model, and files that git doesn't track."""
    root = tmp_path_factory.mktemp("clones") / "tiny_model"
    root.mkdir()
    for name in ("README.md", "LICENSE", ".gitignore", ".gitattributes"):
        shutil.copy(REPOSITORY / name, root)
    save_model(root, byte_model())
    byte_tokenizer().save_pretrained(root)
    git(root, "init", "--quiet")
    commit_all(root)
    for name in ("runs/a/checkpoints/step-1/optimizer.safetensors", "tokens/train.bin", "corpus/a.parquet", ".token"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TOKEN)
    return root


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A clone to change."""
    git(tmp_path, "clone", "--quiet", str(root), "clone")
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def llama(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama form of the model, with the record and the card of an export."""
    folder = tmp_path_factory.mktemp("exports") / "llama"
    llama_twin(byte_model()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text('---\nlicense: mit\n---\n\nmodel = "path/to/this/folder"\n')
    base = {"model": str(root), "sha256": sha256(root / "model.safetensors")}
    (folder / "report.json").write_text(json.dumps({"base": base}))
    return folder


@pytest.fixture(scope="module")
def adapter(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as `finetune` saves it, which was trained from the local folder of the model."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    model = adapted_model()
    model.peft_config["default"].base_model_name_or_path = str(root)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    base = {"model": str(root), "sha256": sha256(root / "model.safetensors")}
    (folder / "metrics.json").write_text(json.dumps({"base": base}))
    card = Card("An adapter", "It writes.", "text-generation", str(root), base["sha256"], True, "", {}, [], {})
    write_card(folder, card)
    (folder / "checkpoints/checkpoint-1").mkdir(parents=True)
    (folder / "checkpoints/checkpoint-1/optimizer.pt").write_bytes(b"state")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serving_hub() as server:
        server.add_account(TOKEN, "someone", orgs=("lab",))
        server.add_account(READ_TOKEN, "reader", role="read")
        yield server


@pytest.fixture(scope="module")
def environment(hub: HubServer) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "0",
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture(scope="module")
def push(root: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Push]:
    """Run the command in a fork of a process that has imported all it needs, which saves the seconds of imports.

    It must be another process than pytest's, because the client reads its settings when it is imported.
    """
    program = """
import json, os, sys
import healthslm.arguments, healthslm.hub.publish
from healthslm.cli import main
for line in sys.stdin:
    sys.argv, settings, output = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.update(settings)
        for descriptor in (1, 2):
            os.dup2(os.open(f"{output}/{descriptor}", os.O_WRONLY | os.O_CREAT), descriptor)
        main("push-to-hub")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*arguments: object, root: Path = root, **settings: str) -> subprocess.CompletedProcess[str]:
        output = tmp_path_factory.mktemp("output")
        command = ["push_to_hub.py", *map(str, arguments), "--root", str(root)]
        parent.stdin.write(json.dumps([command, settings, str(output)]) + "\n")
        parent.stdin.flush()
        status = int(parent.stdout.readline())
        return checked(subprocess.CompletedProcess(command, status, *((output / n).read_text() for n in "12")))

    yield run
    parent.stdin.close()
    parent.wait()


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The result of a command that showed no secret and no traceback."""
    assert "hf_" not in done.stdout + done.stderr
    assert "secret-of-the-upload" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def siblings(llama: Path, adapter: Path) -> str:
    return yaml.safe_dump({"llama": str(llama), "lora": str(adapter)}, default_flow_style=True).strip()


@pytest.fixture(scope="module")
def pushed(hub: HubServer, push: Push, siblings: str) -> HubServer:
    """The Hub with the model, its Llama form and an adapter."""
    done = push(MODEL, "--siblings", siblings, "--tag", "v1.0.0")
    assert done.returncode == 0, done.stderr
    for name in (MODEL, f"{MODEL}-llama", f"{MODEL}-lora"):  # what readers pin
        assert f"{hub.endpoint}/{name}: revision {hub.repositories[name].head}\n" in done.stderr
    return hub


def test_the_files_that_git_tracks_are_published_and_no_others(pushed: HubServer, root: Path) -> None:
    tracked = set(git(root, "ls-files").split())
    files = pushed.repositories[MODEL].files
    assert files.keys() == tracked - {".gitattributes"} | {".eval_results/pubmedqa.yaml"}
    assert all(files[name] == (root / name).read_bytes() for name in files if not name.startswith(".eval_results"))


def test_weights_are_in_lfs_as_the_hub_wants_it(pushed: HubServer) -> None:
    repository = pushed.repositories[MODEL]
    files = repository.commits[repository.head]
    assert {name for name, blob in files.items() if blob.in_lfs} == {"model.safetensors"}


def test_repositories_are_private_tagged_and_in_a_private_collection(pushed: HubServer) -> None:
    names = [MODEL, f"{MODEL}-llama", f"{MODEL}-lora"]
    for name in names:
        repository = pushed.repositories[name]
        assert repository.private
        assert repository.tags == {"v1.0.0": repository.head}
        assert len(repository.commits) == 2  # the Hub's and ours
    (collection,) = pushed.collections.values()
    assert collection["private"]
    assert [item["id"] for item in collection["items"]] == names


def test_the_evaluation_on_a_data_set_of_the_hub_is_published_in_its_format(pushed: HubServer) -> None:
    file = pushed.repositories[MODEL].files[".eval_results/pubmedqa.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(file))
    (in_card,) = [r for r in ModelCard.load(REPOSITORY / "README.md").data.eval_results if r.dataset_name == "PubMedQA"]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("qiaojin/PubMedQA", "pqa_labeled", in_card.metric_value)
    assert "95% interval 0.298 to 0.381; always 'yes': 0.552" in str(entry.notes)


@pytest.mark.parametrize(("ending", "relation"), [("llama", "quantized"), ("lora", "adapter")])
def test_siblings_name_the_model_as_their_base(pushed: HubServer, ending: str, relation: str) -> None:
    data = ModelCard(pushed.repositories[f"{MODEL}-{ending}"].files["README.md"].decode()).data
    assert (data.base_model, data["base_model_relation"]) == (MODEL, relation)


def test_an_adapter_is_published_without_state_of_the_training_and_without_local_paths(
    pushed: HubServer, adapter: Path, root: Path
) -> None:
    files = pushed.repositories[f"{MODEL}-lora"].files
    expected = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files.keys() == expected | ({"chat_template.jinja"} & files.keys())
    assert not [name for name, content in files.items() if str(root).encode() in content]
    assert root.name.encode() not in files["README.md"].replace(b"\\", b"")
    assert f"| base model | {MODEL} |" in files["README.md"].decode()


def test_the_card_of_an_export_names_its_repository_in_its_code(pushed: HubServer) -> None:
    assert f'model = "{MODEL}-llama"' in pushed.repositories[f"{MODEL}-llama"].files["README.md"].decode()


def test_the_token_goes_to_the_hub_only_and_into_no_file(pushed: HubServer, tmp_path: Path) -> None:
    assert {request.token for request in pushed.sent("PUT", "/storage/")} == {None}
    for repository in pushed.repositories.values():
        assert not [name for name, content in repository.files.items() if TOKEN.encode() in content]
    written = [path for path in Path(os.environ["HF_HOME"]).rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_pushing_the_same_again_changes_nothing(pushed: HubServer, push: Push, siblings: str) -> None:
    heads = {name: repository.head for name, repository in pushed.repositories.items()}
    before = len(pushed.requests)
    done = push(MODEL, "--siblings", siblings, "--tag", "v1.0.0")
    assert done.returncode == 0, done.stderr
    assert {name: repository.head for name, repository in pushed.repositories.items()} == heads
    sent = {request.path for request in pushed.requests[before:] if request.method in ("POST", "PUT")}
    assert all(path.startswith("/api/collections") for path in sent)


def load_by_name(name: str, commit: str, ids: str) -> dict:
    """Load the model, its Llama form and its adapter from the Hub; runs in a clean process."""
    import peft
    import torch
    import transformers

    ids = torch.tensor(json.loads(ids))
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = {
        "pinned": load(name, revision=commit, trust_remote_code=True),
        "tagged": load(name, revision="v1.0.0", trust_remote_code=True),
        "newest": load(name, trust_remote_code=True),
        "llama": load(f"{name}-llama", revision="v1.0.0"),
        "adapter": peft.PeftModel.from_pretrained(
            load(name, revision=commit, trust_remote_code=True), f"{name}-lora", revision="v1.0.0"
        ),
        "adapter_alone": peft.AutoPeftModelForCausalLM.from_pretrained(
            f"{name}-lora", revision="v1.0.0", trust_remote_code=True
        ),
    }
    pipeline = transformers.pipeline("text-generation", model=name, revision=commit, trust_remote_code=True)
    return {
        "logits": {kind: model.eval()(ids).logits.tolist() for kind, model in loaded.items()},
        "code": type(loaded["pinned"]).__module__,
        "generated": pipeline("Aspirin", max_new_tokens=5, do_sample=False)[0]["generated_text"],
    }


@pytest.fixture(scope="module")
def updated(pushed: HubServer, push: Push, root: Path, tmp_path_factory: pytest.TempPathFactory) -> HubServer:
    """The Hub after the model was replaced by another and a file was removed."""
    clone = tmp_path_factory.mktemp("update")
    git(clone, "clone", "--quiet", str(root), "clone")
    clone /= "clone"
    save_model(clone, changed_model())
    (clone / "LICENSE").unlink()
    commit_all(clone)
    done = push(MODEL, "--replace", "--tag", "v2.0.0", root=clone)
    assert done.returncode == 0, done.stderr
    return pushed


def test_an_update_replaces_changed_files_and_deletes_removed_ones(updated: HubServer) -> None:
    repository = updated.repositories[MODEL]
    _, old, new = repository.commits.values()
    assert old.keys() - new.keys() == {"LICENSE"}
    changed = {name for name in new if old[name].content != new[name].content}
    assert changed == {"model.safetensors", "results/pubmedqa.json"}
    assert repository.tags["v2.0.0"] == repository.head != repository.tags["v1.0.0"]


@pytest.fixture(scope="module")
def loaded(updated: HubServer, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        commit = updated.repositories[MODEL].tags["v1.0.0"]
        found = result_of(start_clean_process(home, load_by_name, MODEL, commit, random_ids(2, 9).tolist()))
    assert not [path for path in home.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    return found


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("pinned", byte_model),
        ("tagged", byte_model),
        ("newest", changed_model),
        ("llama", byte_model),
        ("adapter", adapted_model),
    ],
)
def test_a_name_and_a_revision_load_the_published_weights(
    loaded: dict[str, Any], kind: str, model: Callable[[], torch.nn.Module]
) -> None:
    torch.testing.assert_close(torch.tensor(loaded["logits"][kind]), model()(random_ids(2, 9)).logits)


def test_an_adapter_alone_loads_with_the_newest_base(loaded: dict[str, Any]) -> None:
    model = adapted_model()
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.mul_(-1)
    torch.testing.assert_close(torch.tensor(loaded["logits"]["adapter_alone"]), model(random_ids(2, 9)).logits)


def test_the_pinned_revision_runs_its_own_code(loaded: dict[str, Any], updated: HubServer) -> None:
    assert updated.repositories[MODEL].tags["v1.0.0"] in loaded["code"]


def test_a_pipeline_loads_by_name(loaded: dict[str, Any]) -> None:
    assert loaded["generated"].startswith("Aspirin")
    assert len(loaded["generated"]) > len("Aspirin")


def test_a_dry_run_lists_everything_and_sends_nothing(hub: HubServer, push: Push, root: Path, siblings: str) -> None:
    before = len(hub.requests)
    done = push("lab/dry", "--siblings", siblings, "--dry-run", "--tag", "v1", HF_TOKEN="")
    assert (done.returncode, len(hub.requests)) == (0, before)
    weights = root / "model.safetensors"
    assert f"{weights.stat().st_size:>13,}  {sha256(weights)}  model.safetensors" in done.stdout
    headings = [line for line in done.stdout.splitlines() if line.startswith("lab/")]
    assert [line.partition(":")[0] for line in headings] == [
        "lab/dry (private, tag v1)",
        "lab/dry-llama (private, tag v1)",
        "lab/dry-lora (private, tag v1)",
    ]
    assert "lab/dry" not in hub.repositories


def test_an_upload_that_was_killed_is_repeated_by_the_same_command(
    hub: HubServer, push: Push, root: Path, environment: dict[str, str]
) -> None:
    hub.storage.clear()
    hub.faults["PUT storage"] = ["hold"]
    script = REPOSITORY / "scripts/push_to_hub.py"
    command = [sys.executable, str(script), "lab/killed", "--root", str(root)]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE)
    assert hub.holding.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hub.repositories["lab/killed"].files == {}
    done = push("lab/killed")
    assert done.returncode == 0, done.stderr
    assert len(hub.repositories["lab/killed"].commits) == 2
    assert hub.repositories["lab/killed"].files["model.safetensors"] == (root / "model.safetensors").read_bytes()


def test_an_upload_that_the_network_cuts_once_continues(hub: HubServer, push: Push, root: Path) -> None:
    hub.storage.clear()
    hub.faults["PUT storage"] = ["cut"]
    done = push("lab/cut", "--public")
    assert done.returncode == 0, done.stderr
    assert not hub.repositories["lab/cut"].private
    assert hub.repositories["lab/cut"].files["model.safetensors"] == (root / "model.safetensors").read_bytes()


ERRORS: dict[str, tuple[str, dict[str, str], str]] = {
    "no token": ("lab/new", {"HF_TOKEN": ""}, "no token for the Hub: run `hf auth login`, or set HF_TOKEN"),
    "wrong token": ("lab/new", {"HF_TOKEN": "hf_wrong"}, "the Hub refuses the token"),
    "read-only token": ("reader/new", {"HF_TOKEN": READ_TOKEN}, "the token can only read"),
    "other owner": ("other/new", {}, "other/new: the token belongs to someone, who can't publish as other"),
    "name taken": ("lab/taken", {}, "lab/taken: exists already with other files"),
    "public": ("lab/open", {}, "lab/open: is public on the Hub: add --public"),
}


@pytest.mark.parametrize("problem", ERRORS)
def test_a_problem_is_one_line_and_changes_nothing(hub: HubServer, push: Push, problem: str) -> None:
    hub.add_repository("lab/taken", files={"README.md": b"# Another model"})
    hub.add_repository("lab/open", private=False)
    name, settings, message = ERRORS[problem]
    done = push(name, **settings)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert name not in hub.repositories or "model.safetensors" not in hub.repositories[name].files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "the Hub can't be reached in offline mode: unset HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "lab/new: the connection to the Hub failed (ConnectError)"),
    ],
)
def test_a_hub_out_of_reach_is_one_line(
    run_script: RunScript, environment: dict[str, str], root: Path, settings: dict[str, str], message: str
) -> None:
    done = checked(run_script("push_to_hub", "lab/new", "--root", root, env=environment | settings))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


AGAIN = "run the command again, which sends what is missing"
REFUSALS = {
    ("POST create", 403): f"the token may not write there (out of order): use one that can, see {TOKENS_PAGE}",
    ("PUT storage", 403): f"an upload to the Hub failed (HfHubHTTPError): {AGAIN}",
    ("POST commit", 500): "the Hub answered 500 (out of order): run the command again later",
}


@pytest.mark.parametrize(("request_", "status"), REFUSALS)
def test_a_refused_request_is_one_line(hub: HubServer, push: Push, request_: str, status: int) -> None:
    hub.storage.clear()
    hub.faults[request_] = [status]
    done = push("lab/fault")
    message = f"error: lab/fault: {REFUSALS[request_, status]}"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, message)
    assert "lab/fault" not in hub.repositories or hub.repositories["lab/fault"].files == {}


def test_a_tag_is_never_moved(pushed: HubServer, push: Push, clone: Path) -> None:
    (clone / "README.md").write_text("# Changed\n")
    commit_all(clone)
    done = push(MODEL, "--replace", "--tag", "v1.0.0", root=clone)
    assert done.returncode == 1
    assert f"{MODEL}: the tag v1.0.0 marks another revision already" in done.stderr


def refused(root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        push_to_hub(PushOptions(repository="lab/new", root=root, **options))
    return str(raised.value)


def test_uncommitted_changes_are_not_published(clone: Path) -> None:
    (clone / "README.md").write_text("# Draft\n")
    assert "README.md has uncommitted changes" in refused(clone)


def test_ignored_files_are_not_published_although_git_tracks_them(clone: Path) -> None:
    (clone / "tokens").mkdir()
    (clone / "tokens/train.bin").write_bytes(b"tokens")
    git(clone, "add", "--force", "tokens/train.bin")
    git(clone, "commit", "--quiet", "--message", "Tokens")
    assert "tokens/train.bin: git tracks it, but .gitignore excludes it" in refused(clone)


def test_a_folder_that_is_not_a_clone_is_refused(tmp_path: Path) -> None:
    assert "publish from a git clone" in refused(tmp_path)


def test_results_of_other_weights_are_not_published(clone: Path) -> None:
    changed_model().save_pretrained(clone)
    commit_all(clone)
    assert "results of other weights" in refused(clone)


def test_an_export_of_other_weights_is_not_published(clone: Path, llama: Path) -> None:
    save_model(clone, changed_model())
    commit_all(clone)
    assert f"{llama}: made from other weights" in refused(clone, siblings={"llama": llama})


def test_another_folder_is_not_published_as_a_sibling(clone: Path, tmp_path: Path) -> None:
    assert "not a folder of `healthslm export` or `finetune`" in refused(clone, siblings={"x": tmp_path})


@pytest.mark.parametrize("name", ["tiny", "lab/tiny/x", "lab/ti ny"])
def test_an_impossible_name_is_refused(clone: Path, name: str) -> None:
    with pytest.raises(UserError, match="^repository: "):
        push_to_hub(PushOptions(repository=name, root=clone))


def test_a_file_with_the_token_is_not_published(hub: HubServer, push: Push, clone: Path) -> None:
    (clone / "notes.txt").write_text(f"token: {TOKEN}\n")
    commit_all(clone)
    done = push("lab/leak", root=clone)
    assert done.returncode == 1
    assert done.stderr.startswith("error: notes.txt: contains the token")
    assert "lab/leak" not in hub.repositories
