"""The held-out records while a run trains: their loss and a few answers at each evaluation, the scores at its end."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from config import printable
from dataset.loader import make_loader
from evaluation.score import Question, questions_of, score, score_table
from evaluation.tables import metric_table, metrics_line
from evaluation.validation import Sums, Validation, sum_losses
from model.answer import Request
from model.build import autocast
from training.processes import on_main, print_main, total
from training.resume import write_best
from training.run import Run
from training.sharding import gathered_for_inference
from visual.images import ImageError, verify_image

IMAGE_ADDS_NOTHING = 0.01  # fraction of the held-out loss below which swapped images are as good as the own ones
SHOWN_SAMPLES = 4  # questions that are answered at each evaluation


@torch.no_grad()
def evaluate(run: Run) -> None:
    """Measure the held-out loss, answer a few fixed questions, log both, and write best/ if the loss is the lowest so
    far."""
    step = run.position.step
    run.log.flush()
    model = run.model.eval()
    with gathered_for_inference(model):
        found = validate(run, run.config.train.eval_samples)
        questions = [q for q in held_out_questions(run, SHOWN_SAMPLES) if run.answerer.fits(q.turns)][:SHOWN_SAMPLES]
        answers = run.answerer.answer([Request(q.turns, q.images) for q in questions]) if questions else []
    model.train()
    samples = [
        {"id": q.id, "question": q.text, "answer": answer, "reference": q.reference}
        for q, answer in zip(questions, answers, strict=True)
    ]
    texts = [{name: printable(text) for name, text in sample.items()} for sample in samples]
    lines = [f"  {s['question']}  ->  {s['answer']}   (reference: {s['reference']})" for s in texts]
    if run.accelerator.is_main_process:
        tqdm.write("\n".join([f"step {step}: held-out loss {found.loss:.4f}{image_text(found)}", *lines]))
    values = found.values if found.image_adds is None else found.values | {"image_adds": found.image_adds}
    run.log.validation(step, run.epoch(step), values, samples=samples)
    if found.loss < run.position.lowest_val_loss:
        run.position.lowest_val_loss = found.loss
        write_best(run, found.loss)


def image_text(found: Validation) -> str:
    """Return what a line about the held-out loss says of the images, with a warning if they add nothing."""
    if found.image_adds is None:
        return ""
    text = f"; swapped images add {found.image_adds:.4f}"
    if found.image_adds > IMAGE_ADDS_NOTHING * found.loss:
        return text
    return (
        f"{text}\n  warning: the answers do not depend on the image. If it stays so, see whether the questions need it "
        "(python -m dataset.show), let train.projector_start be words, raise train.projector_lr, or try another "
        "model.vision_feature_layer."
    )


def validate(run: Run, count: int | None) -> Validation:
    """Measure loss and accuracy on the first `count` held-out records, divided among the processes. The model must be
    in eval mode and gathered."""
    assert run.validation_set is not None
    accelerator = run.accelerator
    mine = run.validation_records[:count][accelerator.process_index :: accelerator.num_processes]
    size = run.config.train.per_device_train_batch_size
    batches = ([(0, int(i)) for i in mine[start : start + size]] for start in range(0, len(mine), size))
    loader = make_loader(run.validation_set, batches, run.built.tokenizer.pad_token_id, packed=run.is_packed)
    context = autocast(run.precision, accelerator.device)
    sums = sum_losses(run.model, loader, device=accelerator.device, autocast=context, encoder=run.encoder)
    return Validation.of_sums(Sums(*total(accelerator, sums)), run.model.has_experts)


def held_out_questions(run: Run, count: int | None) -> list[Question]:
    """Return the questions of the first `count` held-out records.

    With data.on_bad_image=skip, records whose images cannot be read are left out; the main process finds them for all.
    """
    assert run.validation_set is not None
    qa = run.validation_set.qa

    def is_readable(record: int) -> bool:
        try:
            for path in qa.image_paths(qa[record]):
                verify_image(path)
        except ImageError:
            return False
        return True

    records = run.validation_records[:count].tolist()
    if run.config.data.on_bad_image == "skip":
        records = on_main(lambda: [record for record in records if is_readable(record)])
    return questions_of(qa, records)


def score_held_out(run: Run) -> dict | None:
    """Ask the held-out questions, with their images and with swapped ones; print the table and return the scores. None
    if the run has no validation file. Questions that do not fit into the language model are left out and counted."""
    if run.validation_set is None:
        return None
    found = held_out_questions(run, run.config.train.score_samples)
    questions = [question for question in found if run.answerer.fits(question.turns)]
    print_main(f"asking {len(questions)} held-out questions, with their images and with swapped ones")
    run.model.eval()
    with gathered_for_inference(run.model):
        left_out = len(found) - len(questions)
        scores, _ = score(questions, functools.partial(answer_shared, run), seed=run.config.seed, left_out=left_out)
        with torch.no_grad():
            scores |= validate(run, run.config.train.score_samples).values
    print_main("\n".join([score_table(scores), metrics_line(questions), metric_table(scores)]))
    return scores


def answer_shared(run: Run, questions: Sequence[Question]) -> list[str]:
    """Answer `questions`, divided among the processes. Returns all answers in order on every process."""
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    # neighbours stay together, because questions about one image share the reading of its tokens
    mine = range(len(questions) * rank // processes, len(questions) * (rank + 1) // processes)
    requests = [Request(questions[i].turns, questions[i].images) for i in mine]
    progress = functools.partial(tqdm, disable=not run.accelerator.is_main_process)
    answers = run.answerer.answer_all(requests, run.config.test.batch_size, progress)
    gathered = dict(gather_object([(i, answer.text) for i, answer in zip(mine, answers, strict=True)]))
    return [gathered[i] for i in range(len(questions))]
