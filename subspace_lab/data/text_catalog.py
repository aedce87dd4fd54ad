"""The tasks of text sequences: what is asked, in which words it is answered, how answers are scored, in which order.

The fifteen classification tasks and their label words are those of the T5 benchmarks of O-LoRA (Wang et al., Findings
of EMNLP 2023, arXiv 2310.14152; its files are `CL_Benchmark/<group>/<task>/{train,test}.json`); the questions are
worded anew. TRACE's eight (Wang et al. 2023, arXiv 2310.06762) bring their prompts with them. The others are small sets
that are easy to have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.training.text_scores import Metric


@dataclass(frozen=True)
class TextTask:
    """One task.

    Attributes:
        name: its name, in small letters; folders are found whatever their case.
        question: what is asked of a sentence; rows that are whole prompts are used as they are.
        labels: the words that answer it; none: any text.
        metric: how an answer is scored.
    """

    name: str
    question: str = ""
    labels: tuple[str, ...] = ()
    metric: Metric = "exact_match"

    def prompt(self, sentence: str) -> str:
        """Return question, possible answers and sentence as the model reads them."""
        options = f"Options: {', '.join(self.labels)}\n" if self.labels else ""
        question = f"{self.question}\n" if self.question else ""
        return f"{question}{options}{sentence.strip()}\nAnswer:"


_SENTIMENT = "Which sentiment does this text express?"
_TOPIC = "Which topic is this text about?"
_RELATION = "What does sentence 1 say about sentence 2?"
_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_GOOD, _TRUE = ("Good", "Bad"), ("True", "False")
_DBPEDIA = (
    "Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation", "Building",
    "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work",
)  # fmt: skip
_YAHOO = (
    "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
    "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government",
)  # fmt: skip

TASKS: dict[str, TextTask] = {
    task.name: task
    for task in (
        TextTask("agnews", _TOPIC, ("World", "Sports", "Business", "Science or Technology")),
        TextTask("dbpedia", _TOPIC, _DBPEDIA),
        TextTask("yahoo", _TOPIC, _YAHOO),
        TextTask("amazon", _SENTIMENT, _STARS),
        TextTask("yelp", _SENTIMENT, _STARS),
        TextTask("imdb", _SENTIMENT, _GOOD),
        TextTask("sst-2", _SENTIMENT, _GOOD),
        TextTask("mnli", _RELATION, ("neutral", "entailment", "contradiction")),
        TextTask("cb", _RELATION, ("entailment", "contradiction", "neutral")),
        TextTask("rte", _RELATION, ("contradiction", "entailment")),
        TextTask("qqp", "Do the first sentence and the second sentence mean the same?", ("False", "True")),
        TextTask("boolqa", "Going by the passage, is the answer to the question true or false?", _TRUE),
        TextTask("wic", "Is the word used in the same sense in both sentences?", _TRUE),
        TextTask("multirc", "Going by the paragraph, is the answer to the question true or false?", ("False", "True")),
        TextTask("copa", "", ("A", "B")),
        # TRACE: prompts come with the files
        TextTask("c-stance", metric="exact_text"),
        TextTask("fomc", metric="exact_text"),
        TextTask("meetingbank", metric="rouge_l"),
        TextTask("py150", metric="edit_similarity"),
        TextTask("scienceqa", metric="first_character"),
        TextTask("numglue-cm", metric="exact_text"),
        TextTask("numglue-ds", metric="exact_text"),
        TextTask("20minuten", metric="sari"),
        # small sets, see scripts/prepare_text_tasks.py
        TextTask("trec", "What kind of answer does this question ask for?",
                 ("Description", "Entity", "Abbreviation", "Human", "Location", "Number")),
        TextTask("subj", "Is this sentence an opinion or a fact?", ("Opinion", "Fact")),
        TextTask("mr", _SENTIMENT, _GOOD),
        TextTask("cr", _SENTIMENT, _GOOD),
        TextTask("mpqa", _SENTIMENT, _GOOD),
        TextTask("cola", "Is this sentence acceptable English?", _TRUE),
        TextTask("mrpc", "Do the first sentence and the second sentence mean the same?", ("False", "True")),
        TextTask("books", _SENTIMENT, _GOOD),
        TextTask("dvd", _SENTIMENT, _GOOD),
        TextTask("electronics", _SENTIMENT, _GOOD),
        TextTask("kitchen", _SENTIMENT, _GOOD),
    )
}  # fmt: skip

#: the published orders: 1 to 3 have four of the five data sets (the released configurations leave Yelp out)
ORDERS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "order_1": "dbpedia amazon yahoo agnews",
        "order_2": "dbpedia amazon agnews yahoo",
        "order_3": "yahoo amazon agnews dbpedia",
        "order_4": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
        "order_5": "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
        "order_6": "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
        "trace": "c-stance fomc meetingbank py150 scienceqa numglue-cm numglue-ds 20minuten",
    }.items()
}


def find_task(name: str, others: Sequence[str] = ()) -> TextTask:
    """Return the task of a name, in any case; one of `others`, which are there as folders, is any text to any text.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    folded = name.casefold()
    if folded in TASKS:
        return TASKS[folded]
    if folded in {other.casefold() for other in others}:
        return TextTask(folded)
    known = [*TASKS, *others]
    raise UserError(
        f"data.order: no task '{name}'", hint=did_you_mean(name, known) or f"tasks are {', '.join(sorted(known))}"
    )


def resolve_order(order: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of a sequence's tasks: a published order by its name, or the names themselves.

    Raises:
        UserError: no such order, no task, or a task twice.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            hint = did_you_mean(order, ORDERS) or f"one of {', '.join(ORDERS)}"
            raise UserError(f"data.order={order}: no such order", hint=f"{hint}, or a list of tasks")
        return ORDERS[order]
    names = tuple(name.casefold() for name in order)
    if not names:
        raise UserError("data.order has no tasks", hint="data.order=[agnews,dbpedia]")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"data.order has '{twice[0]}' more than once")
    return names
