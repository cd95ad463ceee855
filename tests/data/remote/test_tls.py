"""Over TLS: a certificate that nobody vouches for is refused at once and told; one that the user trusts will do."""

from __future__ import annotations

import json
import os
import time

import pytest

from livt_scale.config.recipe import Data, Remote
from livt_scale.data.remote.fetch import Fetcher
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import RemoteError
from tests import warm
from tests.data.remote.certificates import self_signed
from tests.data.remote.flaky_server import FlakyServer
from tests.data.remote.real_servers import AWS, s3

QUICK = Remote(tries=8, connect_timeout_s=5, stall_timeout_s=5, deadline_s=60)


@pytest.fixture
def certificate(tmp_path):
    return self_signed(tmp_path / "certificate")


def test_an_untrusted_certificate_is_refused_at_the_first_try_with_url_and_remedy(certificate, local, tmp_path):
    with FlakyServer(local.folder, certificate=certificate) as server:
        begun = time.monotonic()
        with pytest.raises(RemoteError) as caught:
            ShardSet.open(server.url, data=Data(train=server.url, remote=QUICK))
        assert time.monotonic() - begun < 20
        said = str(caught.value)
        assert f"manifest.json cannot be fetched from {server.url}/manifest.json: 1 try in " in said
        assert "the server's certificate is not trusted (self-signed certificate)" in said
        assert "SSL_CERT_FILE" in caught.value.remedy
        assert "\n" not in said
        assert not server.requests


def livt(*words, **environ):
    """The command in a process of its own: aiohttp reads OpenSSL's settings when it is imported."""
    done = warm.run(["-m", "livt_scale", *words], env=os.environ | environ, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_certificate_that_ssl_cert_file_vouches_for_is_taken(certificate, local):
    with FlakyServer(local.folder, certificate=certificate) as server:
        code, out, err = livt("shards", "verify", server.url, SSL_CERT_FILE=str(certificate.certificate))
        assert code == 0, err
        assert {s.name for s in local.manifest.shards} <= set(server.requests)  # all were fetched and checked
        code, out, err = livt("shards", "info", server.url, "--json")
        assert (code, out) == (1, "")
        assert f"{server.url}/manifest.json" in err
        assert "SSL_CERT_FILE" in err
        assert "Traceback" not in err


def test_a_certificate_of_another_host_is_refused_though_it_is_trusted(local, tmp_path):
    another = self_signed(tmp_path / "another", name="DNS:data.example.org")
    with FlakyServer(local.folder, certificate=another) as server:
        code, _, err = livt("shards", "info", server.url, SSL_CERT_FILE=str(another.certificate))
        assert code == 1
        assert "the server's certificate is not trusted (IP address mismatch" in " ".join(err.split())
        assert not server.requests


def test_plain_http_on_a_port_of_tls_and_the_other_way_round_end_after_their_tries(certificate, local, tmp_path):
    told = QUICK.model_copy(update={"tries": 2})
    with FlakyServer(local.folder) as plain, FlakyServer(local.folder, certificate=certificate) as safe:
        for url in (plain.url.replace("http", "https"), safe.url.replace("https", "http")):
            with pytest.raises(RemoteError, match=rf"{url}/manifest.json: 2 tries in"):
                Fetcher(url, told).fetch("manifest.json", tmp_path / "out", most_bytes=10**6)


def test_an_s3_endpoint_with_an_untrusted_certificate_is_refused_and_aws_ca_bundle_helps(
    certificate, tmp_path, monkeypatch
):
    with s3(tmp_path, certificate=certificate) as port:
        for name, value in {**AWS, "AWS_ENDPOINT_URL": f"https://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        refused = r"s3://none/set/manifest.json: 1 try in .*certificate is not trusted \(self-signed certificate\)"
        with pytest.raises(RemoteError, match=refused) as caught:
            Fetcher("s3://none/set", QUICK).fetch("manifest.json", tmp_path / "out", most_bytes=10**6)
        assert "AWS_CA_BUNDLE" in caught.value.remedy
        assert AWS["AWS_SECRET_ACCESS_KEY"] not in json.dumps([str(caught.value), caught.value.remedy])
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate.certificate))
        other = QUICK.model_copy(update={"tries": 7})  # another file system of fsspec's
        with pytest.raises(RemoteError, match=r"1 try in .*404"):  # it answers: there is no such bucket
            Fetcher("s3://none/set", other).fetch("manifest.json", tmp_path / "out", most_bytes=10**6)
