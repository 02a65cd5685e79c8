"""One screen of help for each command: what it does, what it is usually told, and an example."""

from dataclasses import dataclass

PROGRAM = "main.py"
_WIDTH = 30


@dataclass(frozen=True)
class Command:
    """A command of `main.py`.

    Attributes:
        does: What it does, in a sentence.
        example: Command lines, what follows `python main.py`.
        options: Those of its own that are used most, each with what it means.
        common: Whether it takes a configuration, and the options that go with one.
    """

    does: str
    example: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    common: bool = True


_CKPT = ("--ckpt_path FILE", "a checkpoint; `last` is the newest one of this configuration")
_DRY = ("--dry_run true", "only say what would be removed; nothing is written")
_OUTPUT = ("--model.output FOLDER", "where the result goes")
_PUSH = ("--push OWNER/NAME", "also upload the result to the Hugging Face Hub, where it is private")

COMMANDS = {
    "init": Command(
        "Write a commented starter configuration for your own model; asks what is not given.",
        ("init mine --task prune --model FOLDER", "init mine"),
        (
            ("FOLDER", "new folder for the configuration"),
            ("--task NAME", "prune (smaller model), recover (what that cost), prompts (faster prompts),"),
            ("", "sparsify (2:4 weights), compress (training with fewer bytes between ranks)"),
            ("--model MODEL", "Hugging Face folder, hub name or GGUF file"),
        ),
        common=False,
    ),
    "check": Command(
        "Say what is wrong with a configuration: classes, values, files, budgets. Runs nothing.",
        ("check --config configs/quickstart.yaml", "check --command prune --config mine/prune.yaml"),
        (("--command NAME", "the command that is to run (fit)"), _CKPT),
    ),
    "fit": Command(
        "Train: from random weights, with compressed gradients, or to recover what pruning cost.",
        (
            "fit --config configs/quickstart.yaml",
            "fit --config configs/pretraining/gpt2_tiny.yaml --trainer.strategy.compressor Int8",
        ),
        (
            _CKPT,
            ("--trainer.max_steps N", "optimizer steps"),
            ("--trainer.devices N", "ranks on this machine"),
            ("--trainer.strategy NAME", "CompressedFSDP, CompressedFSDP2, CompressedDDP, CompressedDiLoCo"),
            ("--trainer.strategy.compressor NAME", "how gradients are compressed: Int8, TopK, PowerSGD, …"),
            ("--model.learning_rate X", "largest learning rate"),
            ("--data.batch_size N", "samples of a rank in a step"),
            _PUSH,
        ),
    ),
    "validate": Command(
        "Measure perplexity, and what the configuration's callbacks measure.",
        ("validate --config configs/quickstart.yaml --model.pretrained FOLDER --data.tokenizer FOLDER",),
        (_CKPT, ("--model.pretrained FOLDER", "the model")),
    ),
    "test": Command("Measure perplexity on the test split.", ("test --config configs/quickstart.yaml",), (_CKPT,)),
    "predict": Command(
        "Collect what scorers of prompt tokens learn from.",
        ("predict --config configs/token_pruning/saliency.yaml",),
        (_CKPT, ("--model.folder FOLDER", "where the saliency goes"), ("--model.num_samples N", "samples")),
    ),
    "prepare": Command(
        "Tokenise and pack the data into its cache, without training.",
        ("prepare --config configs/quickstart.yaml",),
        (("--data.train FILE", "text: JSON, JSON lines, plain text, a folder, a hub data set"),),
    ),
    "prune": Command(
        "Prune a model once, heads and channels or blocks of weights, and save the result.",
        (
            "prune --config configs/structured_pruning/prune.yaml --model.base FOLDER --data.tokenizer FOLDER",
            "prune --config configs/block_sparsity/oneshot.yaml --model.pretrained FOLDER --data.tokenizer FOLDER",
        ),
        (_DRY, _OUTPUT, ("--model.budget X", "structured pruning: share of the decoder that goes (0.25)"), _PUSH),
    ),
    "calibrate": Command(
        "Measure a model on your text, and write the token pruning that suits it.",
        ("calibrate --config configs/token_pruning/calibrate.yaml --model.base FOLDER --data.tokenizer FOLDER",),
        (_OUTPUT, ("--model.speedup X", "how much faster a prompt is to be read (2.0)"), _PUSH),
    ),
    "verify": Command(
        "Prove on real text that a saved result computes what it claims to.",
        ("verify --config configs/structured_pruning/prune.yaml --model.base FOLDER --data.tokenizer FOLDER",),
        (_OUTPUT,),
    ),
    "export": Command(
        "Write a result in a form that loads without Pare.",
        ("export --config configs/structured_pruning/prune.yaml --model.base FOLDER --data.tokenizer FOLDER",),
        (_OUTPUT, _PUSH),
    ),
    "evaluate": Command(
        "Ask models tasks: local ones without a download, or those of lm-evaluation-harness.",
        ("evaluate --config configs/evaluation/local.yaml",),
        (
            ("--model.models '{NAME: FOLDER}'", "the models"),
            ("--model.tasks '[NAME]'", "tasks of the harness"),
        ),
    ),
    "generate": Command(
        "Continue a prompt, or chat; streamed. Without a prompt it is a loop.",
        (
            'generate --config configs/quickstart.yaml --model_dir FOLDER --chat true --prompt "What is a river?"',
            "generate --config mine/prune.yaml --chat true",
        ),
        (
            ("--model_dir FOLDER", "the model; by default what the configuration writes"),
            ("--prompt TEXT", "what to continue"),
            ("--chat true", "the prompt is a message to a chat model"),
            ("--temperature X", "0 takes the likeliest token (0.8)"),
            ("--max_new_tokens N", "longest continuation (128)"),
            ("--pruner FOLDER", "prune the prompt as `calibrate` found"),
            ("--scorer NAME", "prune the prompt: LastWindow, KeyNorm, …; with --schedule.layers [4,7]"),
        ),
    ),
    "completion": Command(
        "Print what makes a shell complete the command `pare`; needs `pip install shtab`.",
        ("completion bash > ~/.local/share/bash-completion/completions/pare",),
        (("SHELL", "bash, zsh or tcsh"),),
        common=False,
    ),
}

COMMON = (
    ("--config FILE", "the configuration; what follows it on the line wins"),
    ("--model.NAME, --data.NAME VALUE", "any argument of the model or the data"),
    ("--data TextCorpus --data.train F", "your own text instead of documentation on this machine"),
    ("--trainer.NAME VALUE", "any argument of Lightning's Trainer"),
    ("--print_config=skip_default", "show the whole configuration and stop"),
)
OUTPUT_FORMS = (
    ("--json", "the result as one JSON object on stdout, everything else on stderr"),
    ("--quiet", "no progress and no tables; errors and warnings stay"),
)
_MORE = (
    ("COMMAND --help", "a command on one screen"),
    ("COMMAND --help_all", "every argument"),
    ("COMMAND --model.help NAME", "arguments of one class; so --data.help, --trainer.strategy.help, …"),
)
STATUS = "exit status: 0 done, 1 it failed, 2 wrong arguments or configuration, 130 Ctrl-C, 143 SIGTERM"


def overview() -> str:
    """All commands, a line each."""
    lines = [
        f"usage: python {PROGRAM} COMMAND [--config FILE] [options]     (installed: pare COMMAND …)",
        "",
        "Make a language model cheaper, and measure what that costs.",
        "",
        *(f"  {name:<11} {command.does}" for name, command in COMMANDS.items()),
        "",
        "your own model, in three commands:",
        f"  python {PROGRAM} init mine --task prune --model FOLDER",
        f"  python {PROGRAM} prune --config mine/prune.yaml",
        f'  python {PROGRAM} generate --config mine/prune.yaml --chat true --prompt "What is a river?"',
        "",
        *rows(OUTPUT_FORMS),
        *rows(_MORE),
        "",
        STATUS,
    ]
    return "\n".join(lines)


def screen(name: str) -> str:
    """Help for one command."""
    command = COMMANDS[name]
    usage = {"init": "[FOLDER] [options]", "completion": "SHELL"}.get(name, "--config FILE [options]")
    lines = [f"usage: python {PROGRAM} {name} {usage}", "", command.does, ""]
    lines += [f"  python {PROGRAM} {line}" for line in command.example]
    if command.options:
        lines += ["", f"options of {name}:", *rows(command.options)]
    if command.common:
        lines += ["", "options of every command:", *rows(COMMON), *rows(OUTPUT_FORMS)]
        lines += ["", "more:", *rows(_MORE[1:])]
    return "\n".join([*lines, "", STATUS])


def rows(options: tuple[tuple[str, str], ...]) -> list[str]:
    """Options and what they mean, in two columns."""
    return [f"  {option:<{_WIDTH + 3}} {means}" for option, means in options]
