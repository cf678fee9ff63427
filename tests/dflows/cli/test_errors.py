"""What users do wrong: one line that names the key or file, an exit code, nothing half-written."""

import argparse

import pytest
import torch

from dflows.cli.errors import DEBUG, one_line, run_command
from dflows.errors import UserError
from tests.commands import everything_in, run_apart, run_here, small_config, write_text


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path, write_text(tmp_path))


@pytest.fixture
def refused(tmp_path, config, capfd, monkeypatch):
    """Runs what must fail, and returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=1, command="fit"):
        before = everything_in(tmp_path)
        given = ("--config", config, *arguments) if command == "fit" else arguments
        assert run_here("fit" if command == "only" else command, *given) == code
        printed = capfd.readouterr()
        # What it runs on may have been told before, with the time.
        lines = [line for line in printed.err.splitlines() if line and not line[0].isdigit()]
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        assert "usage" not in printed.out + printed.err
        assert everything_in(tmp_path) == before
        return lines[0].removeprefix("error: ")

    return run


def path_of(text):
    return ("--data.source.init_args.path", text)


class TestText:
    def test_missing_file(self, refused):
        line = refused(*path_of("nowhere.txt"))
        assert line == "cannot read nowhere.txt: No such file or directory"

    def test_empty_file(self, refused, tmp_path):
        (tmp_path / "empty.txt").touch()
        assert "empty.txt is empty" in refused(*path_of("empty.txt"))

    def test_invalid_utf8(self, refused, tmp_path):
        (tmp_path / "bad.txt").write_bytes(b"abc\xff" * 100)
        assert refused(*path_of("bad.txt")).startswith("bad.txt is not UTF-8 at byte 3")

    def test_window_longer_than_the_text(self, refused):
        line = refused("--data.length", 100_000_000)
        assert "a window of length 100000000 is longer than the 2400 characters" in line
        assert "set length to 2400 or less" in line

    def test_one_symbol(self, refused, tmp_path):
        (tmp_path / "one.txt").write_text("a" * 500)
        assert "a vocabulary needs at least 2" in refused(*path_of("one.txt"))

    def test_symbol_unknown_to_training(self, refused, tmp_path):
        (tmp_path / "late.txt").write_text("ab" * 500 + "é" * 100)
        line = refused(*path_of("late.txt"))
        assert "late.txt, line 1, column 1001, in the split test: 'é' (U+00E9) is not among" in line
        assert "unknown: true" in line

    def test_unreachable_hub(self, refused):
        line = refused(
            "--data.source", "datamodules.HubText", "--data.source.init_args.path", "afmck/text8"
        )
        assert line.startswith("the Hugging Face hub cannot be reached for afmck/text8")


class TestKeys:
    def test_missing_configuration(self, refused):
        line = refused("--config", "nowhere.yaml")
        assert line.startswith("no configuration nowhere.yaml: give a file, or one of the shipped")
        assert "quickstart.yaml" in line

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("model: [1", "bad.yaml is not YAML: while parsing a flow sequence"),
            ("just words", "bad.yaml holds no keys"),
            ("trainer: {max_stepz: 3}", "Group 'trainer' does not accept option 'max_stepz'"),
            ("modle: {a: 3}", "Option 'modle.a' is not accepted"),
            (
                "model: {init_args: {lrr: 3}}",
                "model (lightning_modules.FlowModule): Option 'lrr' is not accepted: its keys are",
            ),
            (
                "model: {init_args: {optimization: {foo: 3}}}",
                (
                    "model (lightning_modules.FlowModule): Group 'optimization' does not accept "
                    "option 'foo': its keys are learning_rate, base_learning_rate"
                ),
            ),
            (
                (
                    "model: {init_args: {flow: {init_args: {orderings: [{class_path: "
                    "dflows.orderings.Natural, init_args: {foo: 3}}]}}}}"
                ),
                (
                    "model.flow.orderings (dflows.orderings.Natural): Option 'foo' is not accepted"
                    ": it takes no keys"
                ),
            ),
            (
                "model: {init_args: {flow: {init_args: {backbone: {init_args: {width: five}}}}}}",
                "model.flow.backbone.width (dflows.flows.stack): Expected a <class 'int'>",
            ),
        ],
    )
    def test_bad_configuration(self, refused, tmp_path, content, message):
        (tmp_path / "bad.yaml").write_text(content)
        code = 1 if message.startswith("bad.yaml") else 2
        assert refused("--config", "bad.yaml", code=code).startswith(message)

    def test_configuration_of_bytes(self, refused, tmp_path):
        (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe")
        assert refused("--config", "bad.yaml") == "bad.yaml is not UTF-8: save it as text"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--model.lrr", 3), "Option 'lrr' is not accepted"),
            (("--trainer.max_stepz", 3), "unrecognized arguments: --trainer.max_stepz 3"),
            (("--trainer.max_step", 3), "unrecognized arguments: --trainer.max_step 3"),
            (("--seed_everything", "1" * 20), f"seed_everything is {'1' * 20}: give a number from"),
            (
                ("--seed_everything", -1),
                "seed_everything is -1: give a number from 0 to 4294967295",
            ),
            (("--trainer.max_steps", "many"), "trainer.max_steps: Expected a <class 'int'>"),
            (("--model.flow.backbone", "dflows.backbones.Nope"), "has no attribute 'Nope'"),
            (("--model.flow.backbone", "torch.nn.Linear"), "in_features, out_features"),
            (
                (
                    "--model.flow.bijection",
                    "dflows.bijections.ModularAffine",
                    "--model.flow.bijection.foo",
                    1,
                ),
                "flow.bijection (dflows.bijections.ModularAffine): Option 'foo' is not accepted",
            ),
            # A rank permutation has no scale.
            (
                (
                    "--model.flow.bijection",
                    "dflows.bijections.RankPermutation",
                    "--model.flow.bijection.scale",
                    "true",
                ),
                "(dflows.bijections.RankPermutation): Option 'scale' is not accepted: its keys are",
            ),
            (("--model.flow.bijection.foo", 1), "its keys are num_classes, temperature"),
            (
                ("--model.optimization.foo", 1),
                "unrecognized arguments: --optimization.foo=1: its keys are learning_rate, base_",
            ),
            (
                ("--model.optimization.foo.bar", 1),
                "--optimization.foo.bar=1: --help lists all keys",
            ),
            (
                (
                    *("--model.flow.context.features", 4),
                    *("--model.flow.context.encoder", "torch.nn.Identity"),
                    *("--model.flow.context.encoder.foo", 1),
                ),
                "Option 'foo' is not accepted: it takes no keys",
            ),
        ],
    )
    def test_bad_argument(self, refused, arguments, message):
        assert message in refused(*arguments, code=2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--data.length", 0), "length must be at least 1, not 0"),
            (("--data.length", "null"), "length must be at least 1, not None"),
            (("--data.vocabulary", "null"), "vocabulary is None: give train, corpus, bytes"),
            (("--model.flow.backbone.width", 0), "width is 0: give at least 1"),
            (("--model.optimization.learning_rate", -1), "optimization.learning_rate is -1"),
            (("--trainer.accelerator", "abacus"), "invalid accelerator name"),
            (
                ("--model.base_refit_every", 2, "--model.base_refit_decay", 2),
                "base_refit_decay is 2",
            ),
            (
                ("--model.flow.length", 8),
                "model.init_args.flow.init_args.length is 8, and the data have 16",
            ),
            (
                ("--model.flow.num_classes", 5),
                "model.init_args.flow.init_args.num_classes is 5, and the data have 23",
            ),
            (("--trainer.max_steps", -1), "Layerwise trains in stages"),
            (("--trainer.max_steps", 0), "trainer.max_steps is 0: give at least 1"),
            (("--trainer.max_epochs", 0), "trainer.max_epochs is 0: give at least 1"),
            (("--trainer.val_check_interval", 0), "trainer.val_check_interval is 0: give the"),
            (("--trainer.log_every_n_steps", 0), "trainer.log_every_n_steps is 0: give at least 1"),
            (("--trainer.gradient_clip_val", ".nan"), "trainer.gradient_clip_val is not a number"),
            (("--model.optimization.learning_rate", ".inf"), "optimization.learning_rate is inf"),
            (("--model.optimization.weight_decay", ".nan"), "weight_decay is not a number (nan)"),
            (("--trainer.logger.name", "../up"), "name is '../up', which leaves the folder of all"),
            (("--trainer.logger.version", "/up"), "version is '/up', which leaves the folder of"),
            (("--last_checkpoint.filename", "../up"), "last_checkpoint.filename is '../up': give"),
            (("--trainer.enable_checkpointing", "false"), "trainer.enable_checkpointing is false"),
            (("--seed_everything", "false"), "seed_everything is false"),
        ],
    )
    def test_bad_value(self, refused, arguments, message):
        assert message in refused(*arguments)


class TestRecords:
    """What would be refused when all is done is refused before it begins."""

    def test_name_of_the_configuration(self, refused, tmp_path, config):
        config.rename(tmp_path / "my config.yaml")
        line = refused("--config", "my config.yaml", command="only")
        assert line.startswith("--name is 'my config': expected at most 100 letters")

    @pytest.mark.parametrize(
        ("folder", "reason"),
        [("odd.txt", "odd.txt is a file"), ("odd.txt/a/b", "odd.txt is a file")],
    )
    def test_folder(self, refused, folder, reason):
        line = refused("--record", folder)
        assert line.startswith(f"no record can be written into {folder}: ")
        assert line.endswith(f"{reason}; give another folder")

    def test_folder_of_too_long_a_name(self, refused):
        assert "File name too long; give another folder" in refused("--record", "a" * 300)


def test_a_run_that_fails_in_its_first_validation_leaves_nothing(refused):
    # Lightning checks it once before training, when its logger has already opened files.
    line = refused("--trainer.callbacks", "tests.callbacks.RefuseValidation")
    assert line == "no validation is wanted"


class TestBackbones:
    """Custom backbones that cannot be used."""

    @pytest.fixture
    def with_backbone(self, refused):
        def run(name):
            more = ("--model.flow.backbone.init_args.width", 8)
            return refused("--model.flow.backbone", f"tests.dflows.cli.bad_backbones.{name}", *more)

        return run

    def test_wrong_shape(self, with_backbone):
        assert "(batch, length, width)" in with_backbone("Shortening")

    def test_mixed_examples(self, with_backbone):
        assert "mixes the examples of a batch" in with_backbone("Mixing")

    def test_causal_leak(self, refused):
        line = refused("--model.flow.backbone", "tests.dflows.cli.bad_backbones.Leaking")
        assert "leaks: the value at dimension" in line

    def test_failing(self, with_backbone):
        assert "failed on features" in with_backbone("Failing")


class TestCheckpoints:
    @pytest.mark.parametrize("command", ["evaluate", "generate", "fit"])
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no checkpoint some.ckpt"),
            (b"", "some.ckpt is damaged or no checkpoint of dflows"),
            (b"not a checkpoint at all", "some.ckpt is damaged or no checkpoint of dflows"),
            ({"state_dict": {}}, "some.ckpt is a checkpoint of something else"),
            ([1, 2], "some.ckpt is a checkpoint of something else"),
            ({"state_dict": {}, "dflows": {"format": 7}}, "some.ckpt has the format 7"),
        ],
    )
    def test_foreign_or_damaged(self, refused, tmp_path, command, content, message):
        path = tmp_path / "some.ckpt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        key = "--ckpt_path" if command == "fit" else "--checkpoint"
        assert refused(key, path.name, command=command).startswith(message)

    def test_folder_without_one(self, refused):
        line = refused("--checkpoint", ".", command="generate")
        assert "holds no best.ckpt and no last.ckpt" in line

    def test_code_in_a_pickle_is_not_run(self, refused, tmp_path):
        class Touch:
            def __reduce__(self):
                return open, (str(tmp_path / "touched"), "w")

        torch.save({"state_dict": {}, "dflows": Touch()}, tmp_path / "some.ckpt")
        refused("--checkpoint", "some.ckpt", command="generate")

    def test_none_given(self, refused):
        assert refused(command="evaluate") == "no checkpoint is given: add --checkpoint PATH"


def test_nothing_given(capsys):
    assert run_here("fit") == 1
    assert capsys.readouterr().err == (
        "error: nothing is given to fit: add --config quickstart.yaml, or another\n"
    )


def test_a_process_of_its_own_fails_alike(tmp_path, config):
    done = run_apart("fit", "--config", config, "--model.lrr", 3, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "Option 'lrr' is not accepted" in done.stderr


class TestRunCommand:
    @staticmethod
    def failing(error):
        def main():
            raise error

        return main

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (UserError("width is 0:\n  give more"), 1, "width is 0: give more"),
            (argparse.ArgumentError(None, "no such key"), 2, "no such key"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (ZeroDivisionError("division"), 1, f"ZeroDivisionError: division (set {DEBUG}=1"),
            (ValueError(), 1, "ValueError: ValueError"),
        ],
    )
    def test_errors_become_lines_and_codes(self, error, code, line, capsys):
        assert run_command(self.failing(error)) == code
        assert capsys.readouterr().err.startswith(f"error: {line}")

    @pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (3, 3), ("words", 1)])
    def test_exits_keep_their_codes(self, given, code):
        assert run_command(self.failing(SystemExit(given))) == code

    def test_other_processes_are_named(self, monkeypatch, capsys):
        monkeypatch.setenv("LOCAL_RANK", "1")
        run_command(self.failing(UserError("no")))
        assert capsys.readouterr().err == "error in process 1: no\n"

    def test_tracebacks_can_be_had(self, monkeypatch):
        monkeypatch.setenv(DEBUG, "1")
        with pytest.raises(UserError):
            run_command(self.failing(UserError("no")))

    def test_what_fails_in_a_class_is_said_without_all_that_it_was_given(self):
        given = "Namespace(class_path='some.Class', init_args=Namespace(a=1))"
        error = ValueError(f"Does not validate against any of the Union\nGiven value: {given}")
        error.__cause__ = TypeError("a is\n1")
        assert one_line(error) == "some.Class: a is 1"

    def test_the_user_s_mistake_is_found_beneath_other_errors(self):
        error = ValueError("does not validate")
        error.__cause__ = UserError("width is 0")
        assert one_line(error) == "width is 0"


def test_a_message_has_nothing_that_a_terminal_obeys():
    error = UserError("a\n b \x1b[2J \x9bc \u202e \ud800 é 漢")
    assert one_line(error) == "a b \\x1b[2J \\x9bc \\u202e \\ud800 é 漢"
