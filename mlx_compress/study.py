"""Run a search, with its trials in an optuna study: to be resumed, shared, and looked at.

The study lies in a file (optuna's journal, which several processes and machines may write), or in
whatever database a URL names. A trial that a dead process left behind is tried again.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from .errors import InputError
from .search import Search, Trial
from .stream import Progress, silent


def run_search(
    search: Search,
    loss: Callable[[dict[str, int]], float],
    *,
    storage: str | Path | None = None,
    name: str = "search",
    progress: Progress = silent,
) -> list[Trial]:
    """All trials of a search, those that were there before included.

    `loss(counts)` is tried; `storage` is a file or a URL, None for memory; `name` should tell one
    question from another. Raises `InputError` where optuna is missing or the storage is not usable.
    """
    study = _study(storage, name)
    total = len(search.table) + search.trials
    while True:
        done = _done(study)
        progress("search", min(len(done), total), total)
        counts = search.next(done, _claimed(study))
        if counts is None:
            return done
        number = _claim(study, search, counts)
        study.tell(number, loss(counts))


def _study(storage: str | Path | None, name: str):
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise InputError(
            "--max-trials needs optuna: pip install 'mlx-compress[search]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    held = storage
    try:
        if storage is not None and "://" not in str(storage):
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            held = JournalStorage(JournalFileBackend(str(storage)))
        return optuna.create_study(storage=held, study_name=name, load_if_exists=True)
    except Exception as error:  # whatever a database driver raises
        raise InputError(f"--study {storage}: cannot be opened ({error}).") from error


def _done(study) -> list[Trial]:
    from optuna.trial import TrialState

    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [Trial(dict(t.params), t.value, t.user_attrs["spent"]) for t in found]


def _claim(study, search: Search, counts: dict[str, int]) -> int:
    """Enter a trial as running; returns its number."""
    from optuna.distributions import IntDistribution
    from optuna.trial import TrialState, create_trial

    ranges = {site.name: IntDistribution(0, site.size) for site in search.sites}
    attributes = {"spent": search.spending(counts), "owner": [socket.gethostname(), os.getpid()]}
    study.add_trial(create_trial(
        state=TrialState.RUNNING, params=dict(counts), distributions=ranges, user_attrs=attributes
    ))  # fmt: skip
    trials = study.get_trials(deepcopy=False)
    return next(t.number for t in reversed(trials) if t.user_attrs == attributes)


def _claimed(study) -> list[dict[str, int]]:
    """What living processes are trying now."""
    from optuna.trial import TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [dict(t.params) for t in running if _alive(*t.user_attrs["owner"])]


def _alive(host: str, process: int) -> bool:
    """Whether a process may still be at work; of other machines that is taken to be so."""
    if host != socket.gethostname():
        return True
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
