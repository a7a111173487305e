"""What nodes do, sampled: never in the way of a run, nothing lost while MLflow is away."""

import math

from orchestrator.node_metrics import INTERVAL_SECONDS, Watch, gpus, this_machine


def test_a_machine_says_what_it_does():
    found = this_machine()()["driver"]
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= set(found)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["system_memory_usage_percentage"] <= 100


def test_gpus_are_told_by_number_and_what_is_unknown_is_left_out():
    assert gpus("") == {}
    assert gpus("37, 1024, 81559\n[N/A], 5, 81559\n") == {
        "gpu_0_utilization_percentage": 37, "gpu_0_memory_usage_megabytes": 1024, "gpu_0_memory_megabytes": 81559,
        "gpu_1_memory_usage_megabytes": 5, "gpu_1_memory_megabytes": 81559,
    }  # fmt: skip


class Store:
    def __init__(self):
        self.written, self.away = [], False

    def __call__(self, metrics, taken):
        if self.away:
            raise ConnectionError("away")
        self.written.append((metrics, taken))


def test_samples_are_taken_in_time_and_wait_while_mlflow_is_away():
    clock, told, store = [100.0], [], Store()
    watch = Watch(lambda: {"n1": {"cpu": 1.0}, "n2": {"cpu": 2.0}}, store, told.append, lambda: clock[0], lambda: clock[0])
    for seconds in (0, 1, INTERVAL_SECONDS - 2, 2):
        clock[0] += seconds
        watch()
    assert [taken for _, taken in store.written] == [100.0, 101.0 + INTERVAL_SECONDS]
    assert store.written[0][0] == {"system/n1/cpu": 1.0, "system/n2/cpu": 2.0}
    store.away = True
    for _ in range(3):
        clock[0] += INTERVAL_SECONDS
        watch()
    assert len(told) == 1
    assert "ConnectionError: away" in told[0]
    store.away = False
    clock[0] += INTERVAL_SECONDS
    watch()
    assert len(store.written) == 6
    assert [taken for _, taken in store.written] == sorted(taken for _, taken in store.written)


def test_a_clock_that_is_set_back_or_forward_changes_no_interval():
    passed, clock, store = [5.0], [1e9], Store()
    watch = Watch(lambda: {"n": {"cpu": 1.0}}, store, print, lambda: clock[0], lambda: passed[0])
    for days in (0, -3, 5):
        clock[0] += days * 86400
        for seconds in (0, INTERVAL_SECONDS / 2, INTERVAL_SECONDS / 2):
            passed[0] += seconds
            watch()
    assert [taken for _, taken in store.written] == [1e9, 1e9, 1e9 - 3 * 86400, 1e9 + 2 * 86400]


def test_a_probe_that_has_no_answer_yet_is_asked_again_at_once():
    answers, store = [{}, {}, {"n": {"cpu": 1.0}}], Store()
    watch = Watch(lambda: answers.pop(0), store, print, lambda: 0.0, lambda: 0.0)
    for _ in range(5):
        watch()
    assert (len(store.written), answers) == (1, [])
