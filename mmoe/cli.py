"""The command line. Every command imports what it needs when it runs, so that `mmoe --help` answers at once."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmoe import bench
from mmoe.arguments import Parser, add_set, command, group
from mmoe.ending import DEFECT, DONE, INTERRUPTED, KEYBOARD, USER_ERROR, enter, one_line, say
from mmoe.errors import Interrupted, RankLost, UserError
from mmoe.evaluate import sweep
from mmoe.parallel import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 done; 1 a defect of ours (traceback); 2 the user can mend it (one line); 69 another rank is gone; 75 interrupted
    and saved; 130 Ctrl-C.
    """
    launch.adopt()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # Before torch is imported: a rank that loses its connections says so itself, in one line instead of C++ traces.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, tell, lost = f"rank {rank}: " if ranks > 1 else "", True, False
    with contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            options = _parser(arguments).parse_args(arguments)
            options.run(options)
            enter(rank, DONE, "", tell=False)
            return DONE
        except UserError as error:
            status, message, tell = USER_ERROR, one_line(error), error.tell
        except Interrupted as error:
            status, message, name, tell = INTERRUPTED, str(error), "", rank == 0
        except RankLost as error:
            status, message, name, tell, lost = error.status, one_line(error), "", error.tell, True
        except KeyboardInterrupt:
            status, message, name = KEYBOARD, "stopped by the keyboard", ""
        except Exception as error:
            status, message = DEFECT, f"{type(error).__name__}\n{''.join(traceback.format_exception(error)).rstrip()}"
    if not _told_by_another_rank(rank, status, message, tell) and tell:
        say(f"mmoe: {name}{message}")
    if lost and ranks > 1:
        # An orderly exit would wait for collectives that will never end.
        sys.stdout.flush()
        os._exit(status)
    return status


def _told_by_another_rank(rank: int, status: int, message: str, tell: bool) -> bool:
    """Enter this rank's end in the launcher's list; True where it would tell nothing new.

    That is the same message from another rank, or a defect after another rank's failure: when a rank ends, its peers
    lose their connections to it, and their tracebacks would bury its message.
    """
    known = enter(rank, status, message, tell=tell)
    failed = [entry for entry in known if entry["status"] in (DEFECT, USER_ERROR)]
    if status == DEFECT and failed:
        say(f"mmoe: rank {rank}: ended after rank {failed[0]['rank']}: {message.splitlines()[-1]}")
        return True
    return any(entry["message"] == message and entry["tell"] for entry in known)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="mmoe", description="Pretraining of multimodal mixture-of-experts models.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = command(commands, "train", _train, "train a model from a recipe", "train quickstart --out runs/quickstart")
    train.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or the path of a .toml file")
    train.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/RECIPE)")
    train.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint in DIR")
    text = "begin with this checkpoint's weights: imported ones, or another run's"
    train.add_argument("--from", dest="initial", type=Path, metavar="CHECKPOINT", help=text)
    train.add_argument(
        "--stage", metavar="NAME", help="begin with this stage; the one before it is done, or see --from"
    )
    add_set(train)

    recipes = command(commands, "recipes", _recipes, "list the shipped recipes or show one", "recipes quickstart")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="a recipe to show with every default filled in")
    recipes.add_argument("--count", action="store_true", help="show its parameters instead, all and those in use")
    add_set(recipes)

    evaluate = command(
        commands,
        "evaluate",
        _evaluate,
        "score a checkpoint's answers, or measure its loss, task by task",
        "evaluate runs/quickstart/checkpoints/step_00001000 --suite scenes --data data-cache/scenes/test",
    )
    evaluate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    evaluate.add_argument("--suite", choices=["scenes", "cv_bench", "loss"], required=True)
    text = "a prepared data set; of cv_bench the folder of test_2d.parquet and test_3d.parquet"
    evaluate.add_argument("--data", type=Path, required=True, metavar="PATH", help=text)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    seen = evaluate.add_mutually_exclusive_group()
    text = "blank every image: what the questions alone give away"
    seen.add_argument("--blank", dest="images", action="store_const", const="blank", default="shown", help=text)
    text = "leave the images out of the prompts altogether"
    seen.add_argument("--no-images", dest="images", action="store_const", const="none", help=text)
    text = "only N samples: the first ones, of cv_bench N rows at even distances"
    evaluate.add_argument("--limit", type=int, metavar="N", help=text)
    text = "loss alone: of the model that this recipe begins with, CHECKPOINT handed over to it (-: its first weights)"
    evaluate.add_argument("--as", dest="recipe", metavar="RECIPE", help=text)
    evaluate.add_argument("--stage", metavar="NAME", help="the stage of RECIPE, where it has any")
    text = "in front of every sample, as a mixture's system_prompt"
    evaluate.add_argument("--system-prompt", default="", metavar="TEXT", help=text)

    example = "sweep quickstart --out runs/encoders --encoders all --data data-cache/scenes/test"
    sets = command(commands, "sweep", sweep.run, "compare sets of a recipe's encoders, each trained alone", example)
    sweep.add_arguments(sets)
    add_set(sets)

    generate = command(
        commands,
        "generate",
        _generate,
        "answer a prompt about pictures",
        "generate runs/quickstart/hf --prompt 'what is this ?' --image picture.png",
    )
    generate.add_argument("model", type=Path, metavar="CHECKPOINT|HF_DIR")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--image", type=Path, nargs="+", default=[], metavar="FILE")
    text = "in front of the pictures, as a mixture's system_prompt"
    generate.add_argument("--system-prompt", default="", metavar="TEXT", help=text)
    generate.add_argument("--max-tokens", type=int, default=32, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling, where T is above 0")

    convert = group(commands, "convert", "Hugging Face format, both ways")
    from_hf = command(convert, "from-hf", _from_hf, "make a checkpoint", "convert from-hf HF_DIR runs/imported")
    from_hf.add_argument("source", type=Path, metavar="HF_DIR")
    from_hf.add_argument("out", type=Path, metavar="OUT")
    example = "convert from-parts llava_1_5_7b runs/parts --part encoders.clip=CLIP_DIR --part language=VICUNA_DIR"
    text = "make a recipe's first checkpoint of published parts"
    from_parts = command(convert, "from-parts", _from_parts, text, example)
    from_parts.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or the path of a .toml file")
    text = "then: mmoe train RECIPE --from OUT/checkpoints/step_00000000"
    from_parts.add_argument("out", type=Path, metavar="OUT", help=text)
    text = "encoders.NAME, language or connector, as in train.frozen, and its Hugging Face directory; others have the "
    text += "recipe's first weights"
    from_parts.add_argument("--part", action="extend", nargs="+", required=True, metavar="MODULE=HF_DIR", help=text)
    from_parts.add_argument("--stage", metavar="NAME", help="the stage that begins with it (default: the first one)")
    text = "tokenizer.json (default: the language part's)"
    from_parts.add_argument("--tokenizer", type=Path, metavar="FILE", help=text)
    add_set(from_parts)
    example = "convert to-hf runs/quickstart/checkpoints/step_00001000 runs/quickstart/hf"
    to_hf = command(convert, "to-hf", _to_hf, "write a self-contained Hugging Face directory", example)
    to_hf.add_argument("source", type=Path, metavar="CHECKPOINT")
    to_hf.add_argument("out", type=Path, metavar="OUT")
    text = "of the weights (default: as stored in the checkpoint); the router stays in fp32"
    to_hf.add_argument("--dtype", choices=["fp32", "bf16"], help=text)
    text = "of the whole model (default: auto, transformers' own class where it computes the same; llava_llama and "
    text += "cambrian: the layouts of released LLaVA and Yi-VL, and Cambrian-1)"
    formats = ["auto", "llava", "llava_llama", "cambrian", "mmoe"]
    to_hf.add_argument("--format", choices=formats, default="auto", help=text)
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file with weights (default: 5GB)")
    text = (
        "LongCat-Flash's gate and up projections of zero experts: zeros, for transformers (default), or none, for vLLM"
    )
    to_hf.add_argument("--zero-experts", choices=["zeros", "drop"], default="zeros", help=text)
    example = "convert verify runs/quickstart/checkpoints/step_00001000 runs/quickstart/hf"
    text = "compare two models' weights and logits, or one checkpoint's files with their checksums"
    verify = command(convert, "verify", _verify, text, example)
    verify.add_argument("a", type=Path, metavar="A")
    verify.add_argument("b", type=Path, nargs="?", metavar="B", help="without it: is every file of A as it was saved?")

    example = "convert grow runs/small/checkpoints/step_00001000 runs/deep --factor 2"
    grow = command(convert, "grow", _grow, "stack a model's layers: a deeper run that goes on from there", example)
    grow.add_argument("source", type=Path, metavar="CHECKPOINT")
    grow.add_argument("out", type=Path, metavar="OUT", help="then: mmoe train OUT/recipe.toml --out OUT --resume")
    grow.add_argument("--factor", type=int, default=2, metavar="N", help="how many times as deep (default: 2)")

    data = group(commands, "data", "prepare, check and describe data sets")
    example = "data prepare scenes data-cache"
    prepare = command(data, "prepare", _prepare, "make a data set", example)
    prepare.add_argument("name", metavar="NAME", help="stamps, scenes or cv_bench")
    prepare.add_argument("out", type=Path, metavar="OUT")
    if list(arguments[:2]) == ["data", "prepare"]:
        from mmoe.data.prepare import add_arguments

        add_arguments(prepare)
    example = "data encode recipes/align.toml runs/imported/checkpoints/step_00000000 --out data-cache/features"
    encode = command(data, "encode", _encode, "compute frozen encoders' features once, for data.features", example)
    encode.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or the path of a .toml file")
    encode.add_argument("checkpoint", metavar="CHECKPOINT", help="whose weights; - for the recipe's first ones")
    encode.add_argument("--out", type=Path, required=True, metavar="DIR", help="goes on there where it was interrupted")
    encode.add_argument("--stage", metavar="NAME", help="the stage of the recipe that will read them")
    encode.add_argument("--only", nargs="+", default=[], metavar="ENCODER", help="of the frozen encoders these alone")
    add_set(encode)
    lint = command(data, "lint", _lint, "check every sample of a data set", "data lint data-cache/scenes/train")
    lint.add_argument("path", type=Path, metavar="PATH")
    example = "data stats data-cache/scenes/train --out scenes.html"
    stats = command(data, "stats", _stats, "describe a data set in a page", example)
    stats.add_argument("path", type=Path, metavar="PATH")
    stats.add_argument("--out", type=Path, required=True, metavar="FILE")
    example = "data leakage data-cache/scenes/train data-cache/scenes/test"
    leakage = command(data, "leakage", _leakage, "find test pictures that the training data shows too", example)
    text = "a prepared data set, or a folder of CV-Bench's files"
    leakage.add_argument("train", type=Path, metavar="TRAIN", help=text)
    leakage.add_argument("tests", type=Path, nargs="+", metavar="TEST", help=f"{text}; each is compared with TRAIN")
    leakage.add_argument("--json", type=Path, metavar="FILE", help="write every test picture that is found here")
    text = "bits of 64 that two pictures' hashes may differ by (default: 4)"
    leakage.add_argument("--threshold", type=int, default=4, metavar="N", help=text)

    example = "report runs/quickstart"
    report = command(commands, "report", _report, "write report.html and report.png of a run", example)
    report.add_argument("run_directory", type=Path, metavar="DIR")
    bench.add_suites(
        group(commands, "bench", "measure operators, steps, loading and choices of the model; needs a checkout")
    )
    doctor = command(commands, "doctor", _doctor, "what is installed and which kernels are in use", "doctor")
    text = "compare all ranks of this launch instead: versions, code, recipe, clocks, disk, bandwidth"
    doctor.add_argument("--preflight", action="store_true", help=text)
    doctor.add_argument("recipe", nargs="?", metavar="RECIPE", help="with --preflight: the run's recipe")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="with --preflight: the run's folder")
    add_set(doctor)
    return parser


def _train(options: argparse.Namespace) -> None:
    from mmoe.recipe import load_recipe
    from mmoe.train.stages import train

    recipe = load_recipe(options.recipe, options.set)
    train(recipe, options.out or Path("runs") / recipe.name, options.resume, options.stage, options.initial)


def _recipes(options: argparse.Namespace) -> None:
    from mmoe.recipe import dump_recipe, list_recipes, load_recipe

    if options.count:
        if not options.name:
            raise UserError("--count needs a recipe's name", "", "`mmoe recipes` lists the shipped ones")
        from mmoe.models.count import describe

        print(describe(load_recipe(options.name, options.set).model))
        return
    if options.name:
        print(dump_recipe(load_recipe(options.name, options.set)), end="")
        return
    for name in list_recipes():
        print(f"{name:32} {load_recipe(name).description}")


def _evaluate(options: argparse.Namespace) -> None:
    from mmoe.evaluate import cv_bench, loss, scenes
    from mmoe.evaluate.asked import Asking

    if options.recipe and options.suite != "loss":
        raise UserError("--as is of the suite loss", f"--suite {options.suite}", "leave it out")
    if options.stage and not options.recipe:
        raise UserError("--stage is of the recipe that --as names", f"--stage {options.stage}", "leave it out")
    if options.limit is not None and options.limit < 1:
        raise UserError("so few samples say nothing", f"--limit {options.limit}", "give at least 1")
    begins = partial(loss.run, recipe=options.recipe, stage=options.stage)
    suites = {"scenes": scenes.run, "cv_bench": cv_bench.run, "loss": begins}
    how = Asking(images=options.images, limit=options.limit, system_prompt=options.system_prompt)
    suites[options.suite](options.checkpoint, options.data, options.json, how)


def _generate(options: argparse.Namespace) -> None:
    from mmoe.evaluate.generate import generate

    text = generate(
        options.model,
        options.prompt,
        options.image,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        system_prompt=options.system_prompt,
    )
    print(text)


def _from_hf(options: argparse.Namespace) -> None:
    from mmoe.convert import from_hf

    from_hf(options.source, options.out)


def _from_parts(options: argparse.Namespace) -> None:
    from mmoe.convert.parts import from_parts, parse
    from mmoe.recipe import load_recipe
    from mmoe.train import stages

    recipe = load_recipe(options.recipe, options.set)
    first = stages.name(recipe, 0) if recipe.stages else None
    recipe = stages.one(recipe, options.stage or first)
    from_parts(recipe, options.out, parse(options.part), options.tokenizer)


def _to_hf(options: argparse.Namespace) -> None:
    from mmoe.convert import to_hf

    to_hf(
        options.source,
        options.out,
        options.dtype,
        max_shard_size=options.max_shard_size,
        form=options.format,
        zero_experts=options.zero_experts,
    )


def _verify(options: argparse.Namespace) -> None:
    if options.b is None:
        from mmoe.checkpoint import layout

        print(f"{options.a}: {layout.verify(options.a)} files, all as they were saved")
        return
    from mmoe.convert import verify

    _print_findings(verify(options.a, options.b), f"{options.a} and {options.b}", "differences")


def _grow(options: argparse.Namespace) -> None:
    from mmoe.convert.grow import grow

    print(grow(options.source, options.out, options.factor))


def _prepare(options: argparse.Namespace) -> None:
    from mmoe.data.prepare import run

    run(options.name, options.out, options)


def _encode(options: argparse.Namespace) -> None:
    from mmoe.recipe import load_recipe
    from mmoe.train import encode, stages

    recipe = stages.one(load_recipe(options.recipe, options.set), options.stage)
    encode.run(recipe, None if options.checkpoint == "-" else Path(options.checkpoint), options.out, options.only)


def _lint(options: argparse.Namespace) -> None:
    from mmoe.data.lint import lint

    _print_findings(lint(options.path), str(options.path), "findings")


def _print_findings(findings: Sequence[object], where: str, kind: str) -> None:
    for finding in findings:
        print(one_line(finding))
    if findings:
        raise UserError(f"{len(findings)} {kind}", where, "they are listed on standard output")
    print(f"{where}: no {kind}")


def _stats(options: argparse.Namespace) -> None:
    from mmoe.data.stats import report

    report(options.path, options.out)


def _leakage(options: argparse.Namespace) -> None:
    from mmoe.data.leakage import run

    run(options.train, options.tests, options.json, options.threshold)


def _report(options: argparse.Namespace) -> None:
    from mmoe.evaluate.stages_report import write

    write(options.run_directory)


def _doctor(options: argparse.Namespace) -> None:
    if not options.preflight:
        if options.recipe or options.out or options.set:
            raise UserError("a recipe is compared between ranks", "mmoe doctor", "add --preflight")
        from mmoe.doctor import run

        run()
        return
    from mmoe import preflight
    from mmoe.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set) if options.recipe else None
    preflight.run(recipe, options.out or Path("runs") / (recipe.name if recipe else ""))
