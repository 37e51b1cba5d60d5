"""The CPU kernels run on PyTorch's OpenMP threads: no others, as many as set, none after a fork."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from attention_cases import Case, call, make_options, make_tensors, outputs_and_gradients
from settings import threads

pytestmark = pytest.mark.heavy

PREAMBLE = """
import multiprocessing, os, re, sys
import torch
from vlmo import _C
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention

index = RelativePositionIndex.joint(6, 20)
generator = torch.Generator().manual_seed(1)
values = [torch.randn(4, 57, 3, 16, generator=generator) for _ in range(3)]
values.append(torch.randn(index.entries, 3, generator=generator))

def attend():
    leaves = [t.clone().requires_grad_() for t in values]
    bias = RelativePositionBias(leaves[3], index)
    out = shared_attention(*leaves[:3], bias=bias, backend="cpu")
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

def use_pytorch():
    torch.ones(1 << 20).exp()

def same(results, others):
    return all(map(torch.equal, results, others))

def thread_count():
    return len(os.listdir("/proc/self/task"))
"""


def run(script: str) -> list[str]:
    """Lines that a script prints in a process of its own."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.parametrize("order", ["use_pytorch(), attend()", "attend(), use_pytorch()"])
def test_threads_are_those_of_pytorch(order):
    first, second = order.split(", ")
    lines = run(f"""
        torch.set_num_threads(1)
        attend()
        before = thread_count()
        torch.set_num_threads(4)
        {first}
        print(thread_count() - before)
        {second}
        print(thread_count() - before)
        maps = open("/proc/self/maps").read()
        print(len(set(re.findall(r"/\\S*lib(?:gomp|omp|iomp)\\S*", maps))))
        print(os.path.realpath(_C.thread_runtime()) in maps)
    """)
    assert lines == ["3", "3", "1", "True"]


@pytest.mark.parametrize("used", ["attend()", "use_pytorch()"])
def test_forked_process(used):
    """Of a process whose threads have run, for these kernels or for anything else."""
    lines = run(f"""
        torch.set_num_threads(4)
        {used}
        before = thread_count()

        def child():
            results = attend()
            pipe.send(results[0].double().sum().item())
            sys.exit(0 if thread_count() == 1 else 3)

        receiver, pipe = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            print("hangs")
        print(before > 1, process.exitcode, receiver.recv() == attend()[0].double().sum().item())
    """)
    assert lines == ["True 0 True"]


def test_workers_of_a_data_loader():
    lines = run("""
        class Computed(torch.utils.data.Dataset):
            def __len__(self):
                return 6
            def __getitem__(self, number):
                return attend()[0]

        torch.set_num_threads(4)
        expected = attend()[0]
        loader = torch.utils.data.DataLoader(
            Computed(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120
        )
        print(all(torch.equal(batch[i], expected) for batch in loader for i in range(2)))
    """)
    assert lines == ["True"]


def test_python_threads():
    """Calls of several threads at once give the same bits as alone."""
    cases = [
        Case(length=100, index="random", mask="mask", batch=4, heads=2),
        Case(index="random", lengths=(5, 240, 0, 66), mask=None, causal=True, positions="runs"),
        Case(),
        Case(index=None, length=70, mask="lengths"),
    ]
    inputs = [(make_tensors(c, "cpu", torch.bfloat16), make_options(c, "cpu")) for c in cases]

    def compute(number):
        tensors, options = inputs[number]
        return outputs_and_gradients(
            lambda t: call(cases[number], t, options, backend="cpu"), tensors
        )

    differences: list[tuple[int, str]] = []

    def compare(number):
        torch.set_num_threads(2)  # a setting of each thread
        for _ in range(20):
            for name, value in compute(number).items():
                if not torch.equal(value, expected[number][name]):
                    differences.append((number, name))

    with threads(2):
        expected = [compute(number) for number in range(len(cases))]
        started = [threading.Thread(target=compare, args=(n,)) for n in range(len(cases))]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    assert not differences
