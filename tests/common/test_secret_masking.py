import pytest

from lightning_moevlm.common.secret_masking import is_secret_key, mask_argv, mask_secrets, mask_url_secrets, mask_yaml


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "data.init_args.api_key",
        "hf_token",
        "token",
        "AUTH-TOKEN",
        "db.password",
        "secret_id",
        "access_key",
    ],
)
def test_names_of_secrets(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "num_tokens",
        "mask_token",
        "max_token_id",
        "key",
        "metric_key",
        "token.dim",
        "monkey_keys",
    ],
)
def test_names_of_other_things(key: str) -> None:
    assert not is_secret_key(key)


def test_trees() -> None:
    tree = {
        "api_key": "abc",
        "hub": [{"token": "t"}, {"token": None}, {"token": 5}],
        "secrets": ["a", "b"],
        "later": {"password": "${oc.env:X}"},
        "path": "s3://me:pw@host/x",
        "resolved": "prefix-v4lue-v4lue",
        "short": "abc",
    }
    assert mask_secrets(tree, {"MY_SECRET": "v4lue-v4lue", "HF_TOKEN": "abc", "HOME": "/root"}) == {
        "api_key": "***",
        "hub": [{"token": "***"}, {"token": None}, {"token": 5}],
        "secrets": ["***", "***"],
        "later": {"password": "${oc.env:X}"},
        "path": "s3://***@host/x",
        "resolved": "prefix-***",
        "short": "abc",  # too short to be told from chance
    }


def test_yaml_without_secrets_is_kept_to_the_letter() -> None:
    text = "# why\nmodel: {dim: 8}  # wide\nmask_token: '[MASK]'\n"
    assert mask_yaml(text, {}) == text
    assert mask_yaml("", {}) == ""


def test_yaml_with_a_secret() -> None:
    clean = mask_yaml("a: 1 # note\napi_key: |\n  two\n  lines\n", {})
    assert "two" not in clean
    assert clean.startswith("# a secret was masked")
    assert "a: 1\n" in clean


def test_command_lines() -> None:
    argv = [
        "moevlm",
        "fit",
        "--hub.token",
        "t1",
        "--hub.password=t2",
        "--api_key",
        "--other",
        "v",
        "--url=http://a:b@c",
    ]
    assert mask_argv(argv, {}) == [
        "moevlm", "fit", "--hub.token", "***", "--hub.password=***", "--api_key", "--other", "v", "--url=http://***@c",
    ]  # fmt: skip


def test_urls() -> None:
    for text, clean in (
        ("http://user:p@127.0.0.1:5000 and https://x/y@z", "http://***@127.0.0.1:5000 and https://x/y@z"),
        ("s3://me:p@ss@host/x", "s3://***@host/x"),
        ("('https://x/y?sig=a%2Fb&t=1', 2)", "('https://x/y?***', 2)"),
        ("https://x/y?sig=a#page and what? yes", "https://x/y?***#page and what? yes"),
        ("root: http://a:b@h:8/?X-Amz-Signature=c, next", "root: http://***@h:8/?*** next"),
    ):
        assert mask_url_secrets(text) == clean
