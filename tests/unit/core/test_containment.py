"""Where faults stop, when a process counts as awake, and how changes are told."""

import asyncio
import logging

import pytest

from core.containment import contained, fault_of
from core.errors import InternalError, PoolExhausted


def test_a_bug_is_told_as_an_internal_error_and_logged_once_with_its_traceback(caplog):
    told = []
    with contained("the delivery of tokens", told.append):
        raise ValueError("secret of a user")
    [fault] = told
    assert type(fault) is InternalError and "secret" not in fault.message
    assert fault.message.startswith("the delivery of tokens failed with ValueError")
    [record] = caplog.records
    assert record.levelno == logging.ERROR and "secret" in str(record.exc_info[1])


def test_an_error_of_the_tree_is_told_as_it_is_and_not_logged(caplog):
    error = PoolExhausted("no room")
    assert fault_of("a Submit", error) is error and caplog.records == []


def test_without_anybody_to_tell_every_fault_is_logged(caplog):
    with contained("meeting peers"):
        raise PoolExhausted("no room")
    assert [r.getMessage() for r in caplog.records] == ["meeting peers failed"]


def test_a_cancellation_passes():
    with pytest.raises(asyncio.CancelledError), contained("anything"):
        raise asyncio.CancelledError
