"""What fastcl promises, and what proves it: the table behind ``make scoreboard`` and docs/reliability.md.

A promise is proved by tests of the suite, by a command, or by the committed record of a longer measurement. What needs
a GPU is a row of its own, so that one machine does not pass for another.
"""

from __future__ import annotations

from dataclasses import dataclass

FUNCTIONAL, NATIVE, TRITON, CUDA = (
    f"tests/test_{name}.py::test_" for name in ("functional", "native", "triton", "cuda")
)
DISTRIBUTED, GRAD_CACHE, GPU = (f"tests/test_{name}.py::test_" for name in ("distributed", "grad_cache", "gpu"))
LAYOUTS, PROCESSES, REPEATS = (f"tests/test_{name}.py::test_" for name in ("layouts", "processes", "repeats"))
DURABILITY, RANKS, RUN = (f"tests/trainer/test_{name}.py::test_" for name in ("durability", "ranks", "run"))


@dataclass(frozen=True)
class Promise:
    """One row of the scoreboard.

    Attributes:
        row: its number, with a letter where another row proves more of the same.
        text: what is promised.
        proof: how it is proved, in a few words.
        tests: nodes of pytest that prove it: a folder, a file, or a test with all its parameters.
        command: what proves it where tests do not: exit code 0, and the figure on the last line.
        record: the file in benchmarks/results/ that proves it, of a run too long for the scoreboard.
    """

    row: str
    text: str
    proof: str
    tests: tuple[str, ...] = ()
    command: str = ""
    record: str = ""

    @property
    def needs_gpu(self) -> bool:
        return any(test.startswith("tests/test_gpu.py") for test in self.tests) or "compute-sanitizer" in self.command


def _all(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


SECTIONS: dict[str, tuple[Promise, ...]] = {
    "numbers": (
        Promise(
            "1",
            "gradients are derivatives of their losses, a learned temperature, scale or bias included",
            "`torch.autograd.gradcheck` in fp64",
            (FUNCTIONAL + "gradcheck", "tests/test_pairwise.py::test_gradcheck"),
        ),
        Promise(
            "1a",
            "a loss is what its paper says",
            "every reference against the formula, written a second time as loops over Python numbers",
            ("tests/test_reference.py",),
        ),
        Promise(
            "2",
            "fp32 is fp32, fp64 is fp64: every loss equals its reference on every backend",
            "every row of `fastcl.testing.CASES`, odd shapes, against fp64: fp32 loss 1e-6, gradient 1e-5; fp64 loss "
            "1e-12, gradient 1e-11",
            (*_all(FUNCTIONAL, "matches_reference", "doubles"), NATIVE + "every_loss_on_every_instruction_set"),
        ),
        Promise(
            "3",
            "low precision is no worse than torch",
            "error of the dense loss in the same dtype, from the same rows, plus one rounding; gradients within 1e-3 "
            "(fp16) and 5e-3 (bf16) of fp64",
            _all(FUNCTIONAL, "low_precision", "low_precision_is_no_worse_than_torch"),
        ),
        Promise(
            "11",
            "any temperature from 0.001 to 10; easy pairs keep their digits",
            "error at most 1e-6 + 4 eps / temperature; losses below 1e-13, of which cross-entropy makes 0, are right "
            "to 1e-5",
            _all(FUNCTIONAL, "any_temperature", "easy_pairs_keep_their_digits"),
        ),
        Promise(
            "12",
            "one bad row does not poison the batch; a NaN row makes the loss NaN, so that a gradient scaler sees it",
            "a row of length 0, tiny or huge, in fp16, bf16 and fp32; one NaN row",
            _all(FUNCTIONAL, "one_odd_row_does_not_poison_the_batch", "a_nan_row_gives_a_nan_loss"),
        ),
        Promise(
            "13",
            "degenerate batches are defined",
            "no rows, one row, equal rows, no negatives, no positives",
            _all(
                FUNCTIONAL,
                "tiny_batches",
                "equal_rows_are_finite",
                "no_negatives_is_a_loss_of_zero",
                "supcon_without_positives_is_zero_and_not_counted",
            ),
        ),
        Promise(
            "24",
            "autocast rounds the operands and nothing else; rows of two dtypes compute in the wider; a gradient scaler "
            "scales, and skips a step that is not finite",
            "autocast off, bf16 and fp16; rows of four dtypes; temperature, scale and bias stay fp32",
            _all(
                FUNCTIONAL,
                "autocast_rounds_the_operands_and_nothing_else",
                "mixed_dtypes_compute_in_the_wider",
                "a_gradient_scaler_scales_and_skips",
            ),
        ),
        Promise(
            "36",
            "masks, biases, ceilings, guides, negative scales, in every combination",
            "the matrix written out",
            ("tests/test_pairwise.py",),
        ),
        Promise(
            "37",
            "drop-ins give the numbers of the originals",
            "value and gradients beside the library that is installed",
            ("tests/integrations",),
        ),
    ),
    "tests": (
        Promise(
            "4",
            "no numeric assertion is vacuous",
            "every one that holds is asked again about sixteen wrong results: zero, negated, doubled, 1 % large, a row "
            "or a column off, a row missing, one NaN ...; `tests/planted.py` names the few that are not asked, and why",
            ("tests",),
        ),
        Promise(
            "4a",
            "a wrong kernel is noticed: by the tests, by `fastcl selftest`, and before Triton becomes the default",
            "wrong gradients and sums for the kernels'; a bug for every invariant; examples with shuffled pairs",
            (
                *_all(FUNCTIONAL, "a_wrong_gradient_is_noticed", "a_wrong_sum_is_noticed"),
                *_all("tests/test_cli.py::test_", "selftest_catches_a_wrong_gradient", "selftest_catches_a_wrong_loss"),
                TRITON + "a_wrong_kernel_fails_the_check",
                "tests/test_invariants.py::test_notices_a_bug",
                "tests/test_examples.py::test_with_shuffled_pairs_no_example_passes",
            ),
        ),
        Promise("5", "tests catch bugs", "mutants of formulas and kernels, one at a time", record="mutants.json"),
    ),
    "shapes": (
        Promise(
            "6",
            "it holds on shapes nobody thought of",
            "35 invariants of every loss and primitive: permutation, rotation, duplication, splitting, offsets, tiles, "
            "transposition, units, and more; 245 drawn examples a run, 28,000 by `HYPOTHESIS_PROFILE=nightly`",
            ("tests/test_invariants.py",),
        ),
        Promise(
            "7",
            "any number of rows, any number of features, any strides, one tensor on both sides",
            "odd sizes; rows, biases, keys and upstream gradients spread, transposed, at an odd offset, overlapping: "
            "the bits are those of contiguous copies",
            (
                *_all(FUNCTIONAL, "matches_reference", "non_contiguous_rows_give_the_same_bits"),
                *_all(
                    LAYOUTS,
                    "no_bit_depends_on_where_tensors_lie",
                    "no_bit_of_a_loss_depends_on_where_its_arguments_lie",
                    "one_tensor_may_stand_on_both_sides",
                ),
            ),
        ),
        Promise(
            "8",
            "offsets past 2^31",
            "rows, and features, that far apart, on the CPU",
            (LAYOUTS + "offsets_past_two_to_the_31",),
        ),
        Promise(
            "8g",
            "N x M and N x D past 2^31",
            "65,537 rows against sampled rows in fp64, and offsets past 2^31",
            _all(GPU, "past_2_to_the_31", "offsets_past_2_to_the_31"),
        ),
        Promise(
            "9",
            "nothing is read or written outside of a tensor",
            "NaN before, behind and between rows, biases, keys, ceilings, guides and upstream gradients; canaries "
            "round outputs and every allocation; C++ kernels, and Triton's in the interpreter",
            (
                *_all(NATIVE, "reads_nothing_beside_its_inputs", "writes_nothing_beside_its_outputs"),
                *_all(TRITON, "guard_bands", "writes_nothing_beside_its_outputs"),
                *_all(LAYOUTS, "no_bit_depends_on_where_tensors_lie", "nothing_is_written_beside_outputs"),
            ),
        ),
        Promise(
            "9a",
            "nor by the C++ kernels under sanitizers",
            "AddressSanitizer and UndefinedBehaviorSanitizer",
            command="make sanitize-native",
        ),
        Promise(
            "9b",
            "nor by the CUDA kernels in the simulator",
            "the same, and with every bound left out in turn, which it must see",
            command="make sanitize-cuda",
        ),
        Promise(
            "10",
            "what lay in memory before changes no bit",
            "deterministic algorithms, with NaN in what is not initialised",
            (REPEATS + "what_lay_in_memory_before_changes_no_bit",),
        ),
        Promise(
            "15",
            "no N x M matrix is stored, and nothing for a backward that does not come",
            "peak of 16,384 rows below a sixteenth of the matrix; every loss at 4,096 rows below a quarter; "
            "frozen rows, frozen keys, `no_grad` and `inference_mode`; and the dense loss is noticed",
            (
                *_all(
                    FUNCTIONAL,
                    "no_matrix_is_allocated",
                    "the_family_allocates_no_matrix",
                    "dense_memory_would_be_noticed",
                    "no_backward_buffers_without_a_gradient",
                    "whoever_wants_no_gradient_pays_for_none",
                    "frozen_keys_cost_no_gradient",
                ),
                "tests/test_triples.py::test_no_cube_no_pairs_and_no_matrix_are_allocated",
                NATIVE + "memory_is_linear",
            ),
        ),
    ),
    "repeats": (
        Promise(
            "14",
            "a backward repeats bit for bit, and touches no input",
            "three times with `retain_graph`, once with an upstream gradient of 2; a queue that moves on before it",
            (
                FUNCTIONAL + "backward_repeats_bit_for_bit_and_scales",
                "tests/test_queue.py::test_two_losses_before_one_backward",
                "tests/test_pairwise.py::test_frozen_columns_may_change_before_backward",
            ),
        ),
        Promise(
            "20",
            "the same input gives the same bits",
            "1,000 repeats beside busy threads, class sums and mining too; 1, 2 and 5 threads; tiles kept or not",
            (
                REPEATS + "a_thousand_repeats_beside_busy_threads",
                *_all(NATIVE, "same_bits_for_any_number_of_threads", "same_bits_kept_or_computed_again"),
            ),
        ),
        Promise(
            "20g",
            "nor does a busy GPU change them",
            "repeats beside a noisy stream",
            (GPU + "same_bits_beside_a_noisy_stream",),
        ),
        Promise(
            "21",
            "nothing is tuned by timing unless you ask",
            "tiles come from a static table, the same in every process",
            ("tests/test_tune.py", PROCESSES + "two_ranks_take_the_same_tiles"),
        ),
        Promise(
            "22",
            "threads, forks and processes",
            "eight threads at once; a child after a fork, workers that load data; four processes on one cold cache",
            (
                *_all(NATIVE, "safe_from_several_python_threads", "a_forked_child_computes", "no_thread_at_import"),
                FUNCTIONAL + "eight_threads_agree",
                *_all(
                    PROCESSES,
                    "a_fork_computes_before_and_after_the_first_call",
                    "workers_that_load_data_compute_losses",
                    "processes_on_cold_caches_compile_and_keep_the_same",
                ),
            ),
        ),
        Promise(
            "22a",
            "sixteen processes that start together on cold caches",
            "all compile the same kernels and keep the same file",
            command="python -m benchmarks.cold_cache --processes 16",
        ),
    ),
    "pytorch": (
        Promise("16", "operators are well registered", "`torch.library.opcheck`", ("tests/test_ops.py",)),
        Promise(
            "17",
            "`torch.compile(fullgraph=True)` gives eager's numbers, and two graphs serve all batch sizes",
            "every loss but batch-all and semi-hard triplets, which read a size from the device; frames are counted",
            _all(FUNCTIONAL, "compiles_as_one_graph", "every_batch_size_after_the_second_is_compiled"),
        ),
        Promise(
            "18g",
            "CUDA graphs, and no host synchronisation",
            'sync debug mode "error"; capture, and replays on new data',
            _all(GPU, "no_host_synchronisation", "a_cuda_graph_replays_on_new_data"),
        ),
        Promise(
            "19",
            "what cannot be done is refused in words, and costs nothing but the call",
            "mistakes, word for word, with inputs and queues compared; twenty values of other types for all arguments; "
            "every `raise` of the source; second derivatives and `torch.func`",
            (
                "tests/test_errors.py",
                *_all(
                    FUNCTIONAL,
                    "second_derivatives_are_refused_and_reference_is_the_way_out",
                    "functorch_is_refused_and_reference_is_the_way_out",
                ),
            ),
        ),
        Promise(
            "23g",
            "the device of the tensors and the stream of the caller",
            "a side stream; a device that is not current",
            _all(GPU, "a_side_stream", "tensors_of_a_device_that_is_not_current"),
        ),
        Promise(
            "30",
            "it installs without a compiler and without a GPU",
            "torch runs, and a sentence says why; what is in the files that are released",
            (
                NATIVE + "without_the_module_torch_runs_and_a_sentence_says_why",
                "tests/test_build.py::test_a_failure_has_the_words_of_the_compiler_and_stops_nothing_else",
                "tests/test_package.py",
            ),
        ),
        Promise(
            "30a",
            "the source distribution, a wheel with kernels and one without install where only torch is, and compute",
            "built from a clean clone, installed in an environment of its own; a loss compared, `fastcl selftest`",
            command="python .ci/release.py",
        ),
        Promise(
            "31",
            "importing is cheap",
            "milliseconds over `import torch`",
            command="python -m benchmarks.imports",
        ),
        Promise(
            "31a",
            "and silent",
            "nothing heavy is imported, no CUDA context, no thread, no print",
            (
                "tests/test_cli.py::test_importing_fastcl_prints_nothing_and_imports_nothing_heavy",
                NATIVE + "no_thread_at_import",
            ),
        ),
    ),
    "ranks": (
        Promise(
            "25",
            "every loss over ranks is that of one process: value and gradients; so are the weights after steps",
            "1 to 4 processes of gloo, in fp64; one rank: the very bits; two optimizer steps under DDP and FSDP",
            _all(
                DISTRIBUTED,
                "every_loss_is_that_of_one_process",
                "two_steps_under_ddp_give_the_weights_of_one_process",
                "two_steps_under_fsdp",
            ),
        ),
        Promise(
            "26",
            "uneven and empty ranks",
            "batches of 6 and 6, 8 and 5, 7, 0 and 3, 1, 1, 9 and 2",
            _all(DISTRIBUTED, "every_loss_is_that_of_one_process", "the_share_of_a_rank"),
        ),
        Promise(
            "27",
            "a mistake of one rank is an error on all, and a rank that is gone no hang",
            "thirteen kinds of mistakes, the same words everywhere; one rank dies",
            _all(DISTRIBUTED, "a_mistake_of_one_rank_is_told_to_all", "a_rank_that_is_gone_is_an_error_and_no_hang"),
        ),
        Promise(
            "28",
            "gradient caching is exact, and its memory stays flat",
            "against the whole batch, and against the encoder on every chunk where layers draw or mix; the peak while "
            "the batch grows",
            _all(
                GRAD_CACHE,
                "rows_alone_give_the_gradient_of_the_whole_batch",
                "what_mixes_rows_or_draws_is_replayed",
                "two_towers_of_nested_inputs_and_outputs",
                "autocast_is_replayed",
                "two_ranks_send_gradients_once_and_have_those_of_one_process",
                "memory_stays_flat_when_the_batch_grows",
            ),
        ),
    ),
    "kernels": (
        Promise(
            "29",
            "every GPU since Turing",
            "kernels compiled ahead of time for seven architectures: shared memory, no spills but those allowed, "
            "matrix instructions",
            ("tests/test_aot.py",),
        ),
        Promise(
            "29a",
            "with every tile that a table has",
            "the same, of all",
            record="aot.json",
        ),
        Promise(
            "38",
            "Triton kernels are right",
            "in the interpreter, against fp64, in fp32, fp16 and bf16, every mask, bias and direction",
            ("tests/test_triton.py",),
        ),
        Promise(
            "39",
            "CUDA C++ kernels are right",
            "their own source in a simulator with hostile timing; every barrier, wait, shuffle and mask is left out in "
            "turn, and missed",
            ("tests/test_cuda.py",),
        ),
        Promise(
            "40g",
            "so they are on a GPU",
            "every loss, mask and bias against fp64, any depth, any temperature, autocast, compiled",
            ("tests/test_gpu.py",),
        ),
        Promise(
            "9g",
            "nothing is read or written outside of a tensor on a GPU",
            "compute-sanitizer: memcheck, racecheck, synccheck, initcheck",
            command="compute-sanitizer --error-exitcode 9 python -m benchmarks.sanitized",
        ),
        Promise(
            "41",
            "a kernel that changed is not called verified",
            "hashes of the source",
            ("tests/test_ledger.py",),
        ),
    ),
    "trainer": (
        Promise(
            "32",
            "a killed run ends with the bits of one that was not",
            "SIGKILL at 20 random steps, in a step, in a write or between two renames; also while threads decode files",
            (
                *_all(
                    DURABILITY,
                    "a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been",
                    "a_run_on_files_that_threads_decode_is_killed_as_well",
                ),
                *_all(RUN, "a_resumed_run_ends_as_if_it_had_not_stopped", "other_ways_to_train_resume_as_well"),
            ),
        ),
        Promise(
            "33",
            "a damaged checkpoint is refused, and the one before is used",
            "300 flipped bits, 20 cuts; a full disk; writes that fail",
            (
                *_all(
                    DURABILITY,
                    "every_flipped_bit_and_every_cut_is_refused_or_harmless",
                    "a_flipped_bit_of_a_weight_is_refused",
                    "the_checkpoint_before_is_used_where_the_last_is_damaged",
                    "a_run_goes_on_from_the_checkpoint_before",
                    "weights_that_are_no_numbers_are_never_saved",
                ),
                *_all(RUN, "a_failed_write_leaves_the_old_checkpoint", "a_damaged_checkpoint_is_a_sentence"),
            ),
        ),
        Promise(
            "34",
            "SIGTERM and Ctrl-C end a run after its step, saved, with exit codes 143 and 130, on all ranks",
            "signals in a step; SIGTERM to one rank of four, whose resumed run has the bits of one that was not",
            (
                DURABILITY + "a_signal_ends_a_run_after_its_step",
                RANKS + "four_ranks_leave_together_resume_to_the_bit_and_skip_together",
            ),
        ),
        Promise(
            "35",
            "dirty images, batches that are not finite, and logs that cannot be written do not stop a run",
            "broken files among the images; NaN in views, embeddings, loss or gradients, which leave no trace and are "
            "listed; five in a row stop it; a full disk for four steps",
            (
                *_all(
                    DURABILITY,
                    "a_batch_that_is_not_finite_changes_nothing",
                    "a_run_skips_what_is_not_finite_and_says_so",
                    "five_batches_in_a_row_stop_a_run_wherever_it_was_cut_off",
                    "logs_and_plots_that_cannot_be_written_do_not_stop_a_run",
                ),
                "tests/trainer/test_decoding.py",
            ),
        ),
        Promise(
            "42",
            "two ranks train what one process trains",
            "the weights, to 1e-12 in fp64",
            (RANKS + "two_ranks_reach_the_weights_of_one_process",),
        ),
        Promise(
            "43",
            "it learns, and a control does not",
            "digits: five methods, three seeds, four controls",
            record="digits.json",
        ),
    ),
}
PROMISES = tuple(promise for section in SECTIONS.values() for promise in section)
