"""Numbers of versions, and what the errors of a disk say."""

import errno
import json

import pytest
from huggingface_hub import constants

from edc_hub import hub_errors, versions
from edc_hub.errors import InputError


SOFT = {"codec": "top_k", "top_k": 3, "rand_augment": 2, "shuffle": 2, "view_version": 1, "magnitude": 9}
MANIFEST = {"format_version": "1.0", "classes": ["a"], "configs": {"images": "", "soft_labels": ""}}


@pytest.mark.parametrize(
    ("changed", "version"),
    [
        ({}, "v1.3.0"),
        ({"magnitude": 5}, "v1.3.0"),
        ({"epochs": 5}, "v1.3.0"),
        *(({key: 5}, "v2.0.0") for key in ("codec", "top_k", "rand_augment", "shuffle", "view_version")),
    ],
)
def test_other_columns_or_classes_are_a_major_version(changed, version):
    old, new = ({**MANIFEST, "soft_labels": soft} for soft in (SOFT, {**SOFT, **changed}))
    assert versions.following("v1.2.3", json.dumps(old), json.dumps(new), False) == version
    assert versions.following("v1.2.3", json.dumps(old), json.dumps(old), True) == "v1.2.4"
    assert versions.following("v1.2.3", json.dumps({**old, "classes": ["b"]}), json.dumps(new), True) == "v2.0.0"


@pytest.mark.parametrize(
    ("number", "place", "said", "not_said"),
    [
        (errno.ENOSPC, None, "HF_HOME: cannot write .*disk is full; free some space or set HF_HOME", "again"),
        (errno.EACCES, f"{constants.HF_HUB_CACHE}/x", "HF_HOME: .*no permission; allow it or set HF_HOME", "space"),
        (errno.EACCES, "/elsewhere/x", "^/elsewhere/x: no permission; allow it", "HF_HOME"),
        (errno.ENOSPC, "/elsewhere/x", "^/elsewhere/x: the disk is full; free some space", "HF_HOME"),
    ],
    ids=["full cache", "forbidden cache", "forbidden elsewhere", "full elsewhere"],
)
def test_a_disk_s_error_names_the_place_and_what_helps(number, place, said, not_said):
    with pytest.raises(InputError, match=said) as refused, hub_errors.plain("org/toy"):
        raise OSError(number, "no", place)
    assert not_said not in str(refused.value)
