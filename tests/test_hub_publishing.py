"""Publishing on the Hub and loading from it by name, with the real client and a local Hub."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clean_process import result_of, start_clean_process
from hub_fixtures import TOKEN, Push, adapted_model, changed_model, commit_all, git, refused, save_model, sha256
from hub_server import HubServer
from huggingface_hub import ModelCard, parse_eval_result_entries
from paths import REPOSITORY
from tiny_models import byte_model, random_ids

pytest_plugins = "hub_fixtures"

MODEL = "lab/tiny"


@pytest.fixture(scope="module")
def siblings(llama: Path, adapter: Path) -> str:
    return yaml.safe_dump({"llama": str(llama), "lora": str(adapter)}, default_flow_style=True).strip()


@pytest.fixture(scope="module")
def pushed(hub: HubServer, push: Push, siblings: str) -> HubServer:
    """The Hub with the model, its Llama form and an adapter."""
    done = push(MODEL, "--siblings", siblings, "--tag", "v1.0.0")
    assert done.returncode == 0, done.stderr
    for name in (MODEL, f"{MODEL}-llama", f"{MODEL}-lora"):  # what readers pin
        assert f"{hub.origin}/{name}: revision {hub.repositories[name].head}\n" in done.stderr
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


def test_the_card_of_an_export_names_its_repository_and_its_base_as_the_hub_does(pushed: HubServer, root: Path) -> None:
    card = pushed.repositories[f"{MODEL}-llama"].files["README.md"].decode()
    assert f'pipeline("text-generation", "{MODEL}-llama")' in card
    assert f"The weights of {MODEL} (SHA-256" in card
    assert str(root) not in card


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
        found = result_of(
            start_clean_process(home, load_by_name, MODEL, commit, random_ids(2, 9).tolist(), without=["bitsandbytes"])
        )
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


def test_a_tag_is_never_moved(pushed: HubServer, push: Push, clone: Path) -> None:
    (clone / "README.md").write_text("# Changed\n")
    commit_all(clone)
    done = push(MODEL, "--replace", "--tag", "v1.0.0", root=clone)
    assert done.returncode == 1
    assert f"{MODEL}: the tag v1.0.0 marks another revision already" in done.stderr


def test_an_export_of_other_weights_is_not_published(clone: Path, llama: Path) -> None:
    save_model(clone, changed_model())
    commit_all(clone)
    assert f"{llama}: made from other weights" in refused(clone, siblings={"llama": llama})


def test_another_folder_is_not_published_as_a_sibling(clone: Path, tmp_path: Path) -> None:
    assert "not a folder of `healthslm export` or `finetune`" in refused(clone, siblings={"x": tmp_path})
