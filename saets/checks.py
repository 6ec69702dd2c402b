"""What can be found wrong with an experiment before any weights are read."""

from __future__ import annotations

from saets.errors import InputError
from saets.experiment.config import DATASET, Experiment, packaged
from saets.experiment.goal import Goal, check_contrast, goal_features, load_goal
from saets.hooks import blocks_below, layer_of
from saets.judge.choice import check_judge
from saets.methods.formulas import needs
from saets.model import load_tokenizer, model_shape, model_type, named_device, resolve_device
from saets.sae import check_sae, sae_width
from saets.tokens import check_chat, encode
from saets.vector.vector import SteeringVector, same_model


def check_experiment(experiment: Experiment) -> None:
    """Model, hook, SAE and calibration text exist and fit each other; so does the device, where actors are on CPU slots.

    Raises:
        InputError: the first thing found wrong.
    """
    on_gpu_slots = experiment.execution.gpus_per_actor != 0  # those may be on other nodes
    (named_device if on_gpu_slots else resolve_device)(experiment.model.device)
    d_model, n_layers, d_vocab = model_shape(experiment.model)
    check_place(experiment.hook_name, n_layers)
    check_sae(experiment.sae, d_model)
    for key, top_k in (("effects", experiment.effects.top_k), ("evaluation", experiment.evaluation.top_k)):
        if top_k > d_vocab:
            raise InputError(f"{key}.top_k is {top_k}; the vocabulary has {d_vocab} tokens")
    _check_prompts(experiment)
    text = experiment.effects.calibration_text
    if not text.startswith(DATASET) and not packaged(text).is_file():
        raise InputError(f"effects.calibration_text: no such file: {packaged(text)}")


def check_place(hook_name: str, n_blocks: int) -> None:
    """Raise `InputError` where a model of so many blocks has no such hook, or none below it."""
    if layer_of(hook_name) >= n_blocks:
        raise InputError(f"hook_name {hook_name!r}: the model has blocks 0 to {n_blocks - 1}")
    if blocks_below(hook_name) == 0:
        raise InputError(f"hook_name {hook_name!r} lies before the first block; expected hook_resid_post or a later block")


def _check_prompts(experiment: Experiment) -> None:
    """Chats need a chat template; a rollout must have room for its prompt and at least one token more."""
    tokenizer, effects = load_tokenizer(experiment.model), experiment.effects
    for key in ("effects", "evaluation"):
        if getattr(experiment, key).prompt_format == "chat":
            check_chat(tokenizer, f"{key}.prompt_format is 'chat'")
    lengths = {prompt: len(encode(tokenizer, prompt, effects.prompt_format)) for prompt in effects.prompts}
    longest = max(lengths, key=lengths.__getitem__)
    if lengths[longest] >= effects.length:
        how = "with BOS" if effects.prompt_format == "plain" else "in the chat template"
        raise InputError(
            f"effects.length is {effects.length}, but prompt {longest!r} is {lengths[longest]} tokens {how}; "
            f"expected at least {lengths[longest] + 1}"
        )
    evaluation = experiment.evaluation
    for prompt in evaluation.prompts:
        tokens = encode(tokenizer, prompt, evaluation.prompt_format)
        if len(tokens) == 1 and evaluation.positions == "prompt" and not evaluation.bos:
            raise InputError(
                f"evaluation.positions is 'prompt' without BOS, and prompt {prompt!r} is BOS alone: nothing of its texts would "
                "be steered; set evaluation.bos to true, or choose other prompts or positions"
            )


def check_goals(experiment: Experiment) -> list[Goal]:
    """The experiment's goals, each with what its methods need.

    Raises:
        InputError: no or unknown goals, no features for a method that needs them, feature ids outside the SAE.
    """
    if not experiment.steering.goals:
        raise InputError("steering.goals is empty; name at least one, e.g. --set 'steering.goals=[\"london\"]'")
    goals = [load_goal(name) for name in experiment.steering.goals]
    names = [goal.id for goal in goals]
    if len(set(names)) < len(names):
        raise InputError(f"steering.goals names a goal twice: {', '.join(names)}")
    unknown_goals = set(experiment.steering.features) - set(names)
    if unknown_goals:
        raise InputError(
            f"steering.features names {sorted(unknown_goals)[0]!r}, which is not among steering.goals ({', '.join(names)})"
        )
    if any(needs(method, ingredient) for method in experiment.steering.methods for ingredient in ("target", "decoder_target")):
        width = sae_width(experiment.sae)
        for goal in goals:
            features = goal_features(goal, experiment)
            for feature, _ in (*features.target, *(features.sae or ())):
                if feature < 0 or (width is not None and feature >= width):
                    raise InputError(f"goal {goal.id!r} names feature {feature}; the SAE has features 0 to {(width or 0) - 1}")
    return goals


def check_all(experiment: Experiment, *, judged: bool = True) -> list[Goal]:
    """Everything a whole run needs, what is here before what may be on the hub; returns the goals."""
    goals = check_goals(experiment)
    if judged:
        check_judge(experiment.judge)
    check_experiment(experiment)
    read = ("positive", "feature_contrast")
    if any(needs(method, ingredient) for method in experiment.steering.methods for ingredient in read):
        tokenizer = load_tokenizer(experiment.model)
        for goal in goals:
            check_contrast(tokenizer, goal)
    return goals


def check_vector(experiment: Experiment, vector: SteeringVector, *, force: bool = False) -> None:
    """The vector belongs to the experiment's model and hook.

    Raises:
        InputError: another width, or a hook that the model does not have; without `force` also another model or another hook.
    """
    d_model, n_blocks, _ = model_shape(experiment.model)
    if len(vector.direction) != d_model:
        raise InputError(
            f"the vector has {len(vector.direction)} numbers, the residual stream of {experiment.model.name} has {d_model}; it "
            "belongs to another model"
        )
    if layer_of(vector.hook_name) >= n_blocks:
        raise InputError(f"the vector is for {vector.hook_name}; {experiment.model.name} has blocks 0 to {n_blocks - 1}")
    if force:
        return
    if vector.model and not same_model(vector.model, experiment.model.name):
        raise InputError(
            f"the vector was made for {vector.model} and this experiment steers {experiment.model.name}; give --force if they "
            "are the same weights"
        )
    if vector.hook_name != experiment.hook_name:
        raise InputError(
            f"the vector is for {vector.hook_name}, and this experiment steers at {experiment.hook_name}; give --force if "
            "that is meant"
        )


def check_model_kind(experiment: Experiment, kind: str) -> None:
    """Raise `InputError` where a file says that it was made for another kind of model; "" is unknown."""
    own = model_type(experiment.model)
    if kind and kind != own:
        raise InputError(
            f"the file was made for a model of kind {kind!r} and {experiment.model.name} is of kind {own!r}; give --force if "
            "they are the same"
        )
