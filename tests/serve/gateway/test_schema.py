"""Requests made from the OpenAPI document; thousands of them in tests/chaos/serve_schema.py."""

from serve_schema import cases, run


def test_requests_made_from_the_document_get_the_answers_it_promises(client, proxy):
    key = f"Authorization:{proxy.headers['Authorization']}"
    code, report = run(proxy.url, 3, "-H", key, "--max-failures", "5", timeout_s=300)
    assert code == 0, report
    assert cases(report) > 100, report
