"""Teachers: what members learn from one, kept or computed in the step; who is refused; what keys and results say."""

import csv
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import put_finished, slow
from test_configs import read
from test_training import generators, linear, loop, network, splits
from torch.nn import functional as F

from sparsity import config, experiment, losses, models
from sparsity.errors import ConfigError, WeightsError
from sparsity.experiment.teachers import describe_teacher, teachers_of
from sparsity.population import stack
from sparsity.stages.scoring import COMPUTERS, _Scorer
from sparsity.step import Loss
from sparsity.store import code
from sparsity.teachers import Teacher
from sparsity.training import train
from sparsity.weights import write_state

CPU = torch.device("cpu")
SHARE, TEMPERATURE = 0.7, 3.0


def distilling(teacher, members=1):
    numbers = {"share": torch.full((members,), SHARE), "temperature": torch.full((members,), TEMPERATURE)}
    return Loss(losses.distill, numbers, teacher)


def teacher_on(data, device=CPU):
    return Teacher(network(seed=9), data, device)


def taught(members, way="eager", augment=None, device="cpu", epochs=2):
    data = splits().to(device)
    plan = loop(epochs, optimizer=torch.optim.SGD, fused=True)
    plan = replace(plan, way=way, augment=augment, draws=1 if augment else 0)
    loss = distilling(teacher_on(data, torch.device(device)), len(members))
    loss = replace(loss, numbers={name: number.to(device) for name, number in loss.numbers.items()})
    return train(stack(members, device), data, plan, generators(*range(len(members))), loss=loss)


def as_it_is(images, draws):
    return images


def turned(images, draws):
    return torch.where((draws[:, :1, None, None] < 0.5), images.flip(3), images)


def check_close(one, other, member=0, **tolerance):
    for name, value in one.last.parameters.items():
        torch.testing.assert_close(value[member], other.last.parameters[name][0], **tolerance)


def test_distillation_is_what_a_plain_loop_computes():
    population, data = linear(), splits()
    teacher = teacher_on(data)
    trained = train(population, data, loop(), generators(3), loss=distilling(teacher)).last
    module = torch.nn.Linear(36, 2)
    module.load_state_dict({"weight": population.parameters["1.weight"][0], "bias": population.parameters["1.bias"][0]})
    optimizer, generator = torch.optim.Adam(module.parameters(), lr=1e-2), generators(3)[0]
    for _ in range(2):
        for index in torch.randperm(64, generator=generator).split(16):
            optimizer.zero_grad()
            images, labels = data.train.images[index].float() / 255, data.train.labels[index]
            found = module(images.flatten(1))
            losses.distill(found, labels, teacher.module(images), share=SHARE, temperature=TEMPERATURE).backward()
            optimizer.step()
    torch.testing.assert_close(trained.parameters["1.weight"][0], module.weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("augment", [None, *slow(turned)])
def test_members_together_learn_what_they_learn_alone(augment):
    members = [network(seed=seed) for seed in range(3)]
    together = taught(members, augment=augment)
    for seed, module in enumerate(members):
        data = splits()
        plan = replace(loop(2, optimizer=torch.optim.SGD, fused=True), augment=augment, draws=1 if augment else 0)
        alone = train(stack([module]), data, plan, generators(seed), loss=distilling(teacher_on(data)))
        check_close(together, alone, seed, rtol=1e-4, atol=1e-6)


def test_outputs_that_are_kept_are_those_of_every_step():
    """Nothing is kept where images are augmented, be it to what they were; a second epoch draws another order."""
    kept, computed = (taught([network()], augment=augment, epochs=1) for augment in (None, as_it_is))
    check_close(kept, computed, rtol=1e-4, atol=1e-6)


def test_outputs_on_train_are_computed_once_for_all_stages_and_members():
    data, seen = splits(), []
    teacher = teacher_on(data)
    teacher.module.register_forward_hook(lambda module, given, found: seen.append(len(found)))
    for members in (1, 3):
        loss = distilling(teacher, members)
        train(linear(members), data, loop(2), generators(*range(members)), loss=loss)
    assert sum(seen) == len(data.train) and not teacher.module.training


@pytest.mark.parametrize("augment", [None, *slow(turned)])
def test_a_recorded_step_learns_the_same(augment, caplog):
    eager, recorded = (taught([network()], way, augment) for way in ("eager", "recorded"))
    assert "cannot be recorded" not in caplog.text
    for name, value in eager.last.parameters.items():
        assert torch.equal(value, recorded.last.parameters[name])


@pytest.mark.slow
@pytest.mark.parametrize("augment", [None, turned])
def test_a_compiled_step_learns_the_same(augment, caplog):
    eager, compiled = (taught([network()], way, augment) for way in ("eager", "compiled"))
    assert "cannot be recorded" not in caplog.text and "is not compiled" not in caplog.text
    check_close(eager, compiled, rtol=1e-4, atol=1e-6)


def test_gradients_for_scores_are_of_the_loss_with_its_teacher():
    data, population = splits(), linear(2)
    teacher = teacher_on(data)
    importance, context = SimpleNamespace(batches=1, batch_size=8), SimpleNamespace(splits=data)
    given = population, ["1.weight"], importance, context, distilling(teacher, 2), generators(0, 1)
    found = COMPUTERS["gradient"](_Scorer(*given))["1.weight"]
    for member in range(2):
        index = torch.randperm(64, generator=generators(member)[0])[:8]
        images, weight = data.train.images[index].float() / 255, population.parameters["1.weight"][member].clone()
        outputs = F.linear(images.flatten(1), weight.requires_grad_(), population.parameters["1.bias"][member])
        numbers = {"share": SHARE, "temperature": TEMPERATURE}
        losses.distill(outputs, data.train.labels[index], teacher.module(images), **numbers).backward()
        torch.testing.assert_close(found[member], weight.grad)


def test_a_teacher_that_fails_on_an_image_is_refused():
    data = splits()
    images = data.train.images.float() / 255
    images[5] = 3e38
    data = replace(data, train=replace(data.train, images=images))
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2))
    torch.nn.init.ones_(module[1].weight)
    with pytest.raises(ConfigError, match="gives NaN or infinity on 1 of 64 images of train"):
        Teacher(module, data, CPU).kept  # noqa: B018


# --- files, keys and results -----------------------------------------------------------------------------------------


def written(path, seed=0, shape=(1, 28, 28), num_classes=10, hidden=(8,), classes=None, described=True, scale=1.0):
    """A weights file of an MLP, as a run leaves one or as another program does."""
    module = models.build(partial(models.mlp, hidden=list(hidden)), shape, num_classes, seed)
    state = {name: tensor * scale for name, tensor in module.state_dict().items()}
    about = {"factory": {"_target_": "sparsity.models.mlp", "hidden": list(hidden)}, "input_shape": list(shape)}
    about |= {"num_classes": num_classes, "classes": classes, "mean": None, "std": None}
    if described:
        write_state(path, state, about)
    else:
        torch.save(state, path)
    return path


def folder_of(tmp_path, name="run", **more):
    folder = tmp_path / name
    folder.mkdir()
    put_finished(folder)
    written(folder / "model.safetensors", **more)
    return folder


def distill_run(teacher, *overrides):
    return read("loss=distill", f"loss.teacher={teacher}", *overrides)


def keys_of(*given):
    found = experiment.stage_keys(distill_run(*given), "images", "cpu", "float32")
    return [found[name].key for name in ("pretrain", "finetune")]


@pytest.mark.slow
def test_a_teacher_counts_by_what_it_is_wherever_it_lies(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    keys = keys_of(folder)
    shutil.copy(folder / "model.safetensors", tmp_path / "copy.safetensors")
    assert keys_of(tmp_path / "copy.safetensors") == keys_of(folder / "model.safetensors") == keys
    assert keys_of("run") == keys  # from the folder that this is typed in
    others = [keys_of(written(tmp_path / "other.safetensors", seed=1)), keys_of(folder, "loss.function.share=0.8")]
    foreign = written(tmp_path / "foreign.pth", described=False)
    model = "loss.teacher_model={factory:{_target_:sparsity.models.lenet5},weights:null}"
    others += [keys_of(foreign), keys_of(foreign, model)]
    own = code._our_files()  # which reads the file
    edited = {name: f"{text}." if name.startswith("weights.") else text for name, text in own.items()}
    with monkeypatch.context() as patch:
        patch.setattr(code, "_our_files", lambda: edited)
        others.append(keys_of(folder))
    assert len({key for pair in [keys, *others] for key in pair}) == 2 * (1 + len(others))


@pytest.mark.slow
def test_the_model_is_what_is_typed_what_the_file_says_or_the_runs_own(tmp_path):
    def model(*given):
        return describe_teacher(distill_run(*given).loss)["model"]

    foreign = written(tmp_path / "foreign.pth", described=False)
    assert model(folder_of(tmp_path)) == "mlp hidden=[8]"
    assert model(foreign) == "lenet300"
    given = foreign, "model@loss.teacher_model=mlp", "loss.teacher_model.factory.hidden=[8]"
    assert model(*given) == "mlp hidden=[8]"
    run = distill_run(*given)
    assert not config.idle_settings(run, read_config(given), ["model@loss.teacher_model=mlp"])


def read_config(given):
    from conftest import compose

    return compose(["loss=distill", f"loss.teacher={given[0]}", *given[1:]])[0]


def refusal(tmp_path, file=None, typed=(), data=None, **more):
    """The line that refuses a teacher for digits."""
    file = written(tmp_path / "teacher.safetensors", **more) if file is None else file
    with pytest.raises((ConfigError, WeightsError)) as error:
        run = distill_run(file, *typed)
        sets = data or digits()
        teachers_of(run, sets, CPU)
    return str(error.value).replace(str(tmp_path), "…")


def digits():
    part = replace(splits().train, images=torch.zeros(4, 1, 28, 28, dtype=torch.uint8), labels=torch.arange(4))
    return replace(splits(), train=part, test=part, validation=None, num_classes=10, classes=[*"0123456789"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_classes": 3}, r"loss.teacher=….* is of 3 classes, and the data has 10"),
        ({"shape": (1, 8, 8)}, r"is of images \[1, 8, 8\], and the data's are \[1, 28, 28\]"),
        ({"classes": [*"abcdefghij"]}, "is of other classes: its output 0 is a, and the data's class 0 is 0"),
        ({"classes": [*"0132456789"]}, "is in another order: its output 2 is 3, and the data's class 2 is 2"),
        ({"scale": 1e30}, "a mlp, gives NaN or infinity on images of this data: take another"),
        ({"described": False}, r"loss.teacher=….* does not fit the model; missing: fc3.weight"),
        ({"described": False, "num_classes": 3, "hidden": (300, 100)}, r"does not fit the model; mis-shaped: fc3"),
    ],
)
def test_a_teacher_of_something_else_is_refused(more, words, tmp_path):
    data = digits()
    bright = replace(data, test=replace(data.test, images=data.test.images + 200))
    line = refusal(tmp_path, data=bright, **more)
    assert re.search(words, line) and "\n" not in line, line


@pytest.mark.slow
def test_what_is_no_teacher_is_refused(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert "is the folder of a sweep: give that of one of its members" in refusal(tmp_path, tmp_path / "sweep")
    (tmp_path / "empty").mkdir()
    assert "is no folder of a finished run, as it lacks result.json" in refusal(tmp_path, tmp_path / "empty")
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "as it lacks model.safetensors" in refusal(tmp_path, folder)
    (tmp_path / "text.safetensors").write_text("no weights")
    assert "loss.teacher=…/text.safetensors" in refusal(tmp_path, tmp_path / "text.safetensors")
    good = written(tmp_path / "good.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(good.read_bytes()[:-9])
    assert "is damaged or cut short" in refusal(tmp_path, damaged)
    wrong = ("model@loss.teacher_model=lenet5", "loss.teacher_model.head=new")
    assert "loss.teacher_model.head=new does nothing" in refusal(tmp_path, good, wrong)
    with pytest.raises(ConfigError, match=r"loss.teacher=.* does nothing: cross_entropy asks for none: take loss=dist"):
        read(f"loss.teacher={good}")


def test_a_teacher_of_other_code_needs_trust(tmp_path, monkeypatch):
    file = tmp_path / "own.safetensors"
    about = {"factory": {"_target_": "own_teachers.net"}, "input_shape": [1, 28, 28], "num_classes": 10}
    write_state(file, {"1.weight": torch.zeros(10, 784), "1.bias": torch.zeros(10)}, about)
    words = (
        "loss.teacher_model.factory._target_=own_teachers.net is code from outside: admit it by trust=[own_teachers]"
    )
    assert words in refusal(tmp_path, file)
    code = "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    (tmp_path / "own_teachers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    found, _ = teachers_of(distill_run(file, "trust=[own_teachers]"), digits(), CPU)
    assert found[str(file)].kept.shape == (4, 10)


def test_pixels_that_are_scaled_otherwise_are_told(tmp_path):
    run = distill_run(folder_of(tmp_path))
    assert teachers_of(run, digits(), CPU)[1] == []
    (line,) = teachers_of(run, replace(digits(), mean=[0.5], std=[0.5]), CPU)[1]
    assert "was trained on pixels as they are, and sees those of this run, mean [0.5], std [0.5]" in line


SMALL = ("model=mlp", "model.factory.hidden=[8]", "plots=false")


@pytest.mark.slow
def test_a_run_names_its_teacher_and_the_summary_too(run, tmp_path):
    teacher = run(*SMALL, "stages=[pretrain]", "hydra.run.dir=sweep/teacher")
    more = ("loss=distill", "loss.teacher=sweep/teacher", "loss.function.share=1", "average.kind=mean")
    student = run(*SMALL, *more, "sensitivity=1.5", "hydra.run.dir=sweep/student")
    assert teacher["training"] == {}
    found = student["training"]
    assert (found["loss"], found["average"], found["teacher"]["model"]) == ("distill", "mean", "mlp hidden=[8]")
    assert found["teacher"]["sha256"] == teacher["files"]["model.safetensors"]["sha256"]
    assert found["teacher"]["accuracy"] == teacher["accuracy"]["final"]
    from sparsity.results.sweeps import summarise

    summarise(["sweep"])
    with Path("sweep/summary.csv").open() as file:
        plain, rows = sorted(csv.DictReader(file), key=lambda row: row["folder"], reverse=True)
    assert (plain["training.loss"], rows["training.loss"], rows["training.teacher.model"]) == (
        "",
        "distill",
        "mlp hidden=[8]",
    )
    assert any(
        point["training"].get("loss") == "distill"
        for point in json.loads(Path("sweep/front.json").read_text())["points"]
    )


@pytest.mark.slow
def test_everything_combines_with_a_teacher(run, tmp_path):
    """Compacted finetuning, masks by gradients of the loss while training, augmentation, a loss of one's own."""
    run("model=lenet300", "plots=false", "stages=[pretrain]", "hydra.run.dir=teacher", "store=store")
    more = (*SMALL, "loss=distill", "loss.teacher=teacher", "store=store")
    assert run(*more, "sensitivity=1", "model.factory.hidden=[24]")["accuracy"]["final"]["test"] > 0.5
    gradual = ("recipe=gradual", "prune/importance=taylor", "recipe.train.every=5", "augment=flip_crop")
    found = run(*more, *gradual)
    assert found["training"]["augment"] == "flip_crop" and found["compression"]["weights"] > 1.5
    (Path("taught_losses.py")).write_text(
        "def squares(outputs, labels, teacher): return (outputs - teacher).square().mean()\n"
    )
    own = ("loss.function._target_=taught_losses.squares", "trust=[taught_losses]", "loss.teacher=teacher")
    assert run(*SMALL, *own, "stages=[pretrain]")["training"]["loss"] == "squares"


@pytest.mark.slow
def test_a_population_learns_from_one_teacher_by_numbers_of_its_own(tmp_path):
    folder = folder_of(tmp_path, hidden=(16,))
    small = ("data=digits", "schedule=smoke", "store=null", "precision=float32", "optimizer=sgd", "plots=false")
    small += ("stages=[pretrain,prune,finetune]", "model=mlp", "model.factory.hidden=[8]", "schedule.pretrain.lr=0.05")
    runs = [
        read(
            "loss=distill",
            f"loss.teacher={folder}",
            *small,
            f"loss.function.temperature={2.0 + index}",
            f"seed={index}",
        )
        for index in range(2)
    ]
    assert experiment._kind_of(runs[0]) == experiment._kind_of(runs[1])
    together = experiment.run_members(
        [experiment.Job(each, tmp_path / f"together{index}") for index, each in enumerate(runs)], stacked=True
    )
    for index, each in enumerate(runs):
        (alone,) = experiment.run_members([experiment.Job(each, tmp_path / f"alone{index}")])
        assert together[index]["keys"] == alone["keys"] and together[index]["nonzero"] == alone["nonzero"]
        assert together[index]["accuracy"]["final"]["test"] == pytest.approx(
            alone["accuracy"]["final"]["test"], abs=0.01
        )
    other = folder_of(tmp_path, "other", seed=3)
    different = read("loss=distill", f"loss.teacher={other}", *small)
    assert experiment._kind_of(different) != experiment._kind_of(runs[0])
