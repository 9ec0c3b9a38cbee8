"""Bugs in what travels to ranks, in what they remember, and in how progress is counted."""

from planted.bug import Bug

WIRE = "tests/unit/engine/ranks/test_plan_wire.py"
ARRIVES = f"{WIRE}::test_what_arrives_is_the_plan_whatever_the_scheduler_did"
PROGRESS = "tests/simulation/test_progress.py"
RANKS = "tests/component/test_rank_process.py"

BUGS: list[Bug] = [
    Bug(
        "whole block tables travel with every step",
        "engine/ranks/plan_wire.py",
        "first_block = min(sent.num_blocks, item.start // size)",
        "first_block = 0",
        f"{WIRE}::test_a_decode_step_costs_the_same_bytes_whatever_the_context",
    ),
    Bug(
        "a block replaced by copy on write is not sent to ranks",
        "engine/ranks/plan_wire.py",
        "first_block = min(sent.num_blocks, item.start // size)",
        "first_block = sent.num_blocks",
        f"{WIRE}::test_a_block_that_copy_on_write_replaced_is_sent_again",
    ),
    Bug(
        "ranks keep the table of a sequence that starts again",
        "engine/scheduling/sequences.py",
        "            self._released.append(sequence.key)\n",
        "",
        ARRIVES,
    ),
    Bug(
        "parameters to draw with travel with every token",
        "engine/ranks/plan_wire.py",
        "    if draws == sent.draws:\n        return None\n",
        "",
        f"{WIRE}::test_a_decode_step_costs_the_same_bytes_whatever_the_context",
    ),
    Bug(
        "a rank guesses when tokens are missing",
        "engine/ranks/plan_wire.py",
        "if len(history) != delta.num_known_tokens:",
        "if len(history) > delta.num_known_tokens:",
        f"{WIRE}::test_a_history_with_a_gap_is_refused",
    ),
    Bug(
        "the prompt counts as output",
        "engine/model/rank_memory.py",
        "np.add.at(self._counts, token_ids[num_prompt:][is_known[num_prompt:]], 1)",
        "np.add.at(self._counts, token_ids[is_known], 1)",
        ARRIVES,
    ),
    Bug(
        "a token twice in a delta counts once",
        "engine/model/rank_memory.py",
        "np.add.at(self._counts, token_ids[num_prompt:][is_known[num_prompt:]], 1)",
        "self._counts[token_ids[num_prompt:][is_known[num_prompt:]]] += 1",
        f"{WIRE}::test_a_token_twice_in_one_piece_counts_twice",
    ),
    Bug(
        "fresh ranks are sent news to what dead ones knew",
        "engine/ranks/rank_group.py",
        "        self._encoder = PlanEncoder(self._layout.block_size_tokens)\n",
        "",
        f"{RANKS}::test_a_rank_that_is_sent_news_draws_what_a_runner_with_the_whole_history_draws",
    ),
    Bug(
        "only reported layers are progress",
        "simulation/runner.py",
        """            self.layers_done += 1
            if plan.report_layers:  # as ranks do: they count every layer, and report some
                on_layer(step_id, layer)
""",
        """            if plan.report_layers:
                self.layers_done += 1
                on_layer(step_id, layer)
""",
        f"{PROGRESS}::test_a_step_that_makes_progress_is_no_hang_however_long_it_takes",
    ),
    Bug(
        "a worker's layers do not count as progress",
        "worker/worker.py",
        "layers_done=self._runner.layers_done,",
        "layers_done=0,",
        f"{PROGRESS}::test_a_step_that_makes_progress_is_no_hang_however_long_it_takes",
    ),
    Bug(
        "a restart sets the count of layers back",
        "engine/ranks/rank_group.py",
        "        self._layers_before = self.layers_done\n",
        "",
        f"{RANKS}::test_layers_are_counted_in_every_step_and_a_restart_does_not_set_the_count_back",
    ),
    Bug(
        "a token outside the vocabulary kills the rank",
        "engine/model/runner.py",
        "        if not 0 <= min(ids) <= max(ids) < vocabulary_size:",
        "        if min(ids) < 0:",
        f"{RANKS}::test_a_token_that_the_model_does_not_have_fails_its_sequence_and_no_other",
    ),
    Bug(
        "a bias outside the vocabulary kills the rank",
        "engine/model/runner.py",
        "except (ValueError, IndexError) as error:",
        "except ValueError as error:",
        f"{RANKS}::test_a_bias_on_a_token_that_the_model_does_not_have_fails_its_sequence_alone",
    ),
    Bug(
        "nobody hears of ranks that die between two steps",
        "worker/step_loop.py",
        "            await self._runner.lost()\n            self._is_runner_lost = True\n",
        "            await self._runner.lost()\n",
        "tests/simulation/test_told.py"
        "::test_ranks_that_die_are_told_of_by_the_worker_and_the_router",
    ),
    Bug(
        "a death between two steps is told for ever",
        "engine/ranks/rank_group.py",
        "        await self._lost.wait()\n        self._lost.clear()\n",
        "        await self._lost.wait()\n",
        "tests/component/test_rank_process.py"
        "::test_a_rank_that_dies_between_steps_is_reported_without_a_step",
    ),
    Bug(
        "a rank tells of layers that nobody asked about",
        "engine/ranks/rank.py",
        "        if plan.report_layers and rank == 0:\n",
        "        if rank == 0:\n",
        "tests/contract/test_runner.py"
        "::test_layers_are_reported_in_order_if_the_plan_asks_and_counted_always",
    ),
    Bug(
        "the hash model copies blocks after it has written",
        "simulation/hash_runner.py",
        "        for source, destination in plan.copies:\n"
        "            self._copy(source, destination)\n"
        "        # Layer by layer with a wait in each: transfers overlap with the step, as in "
        "production.\n"
        "        for layer in range(self._layout.num_layers):\n"
        "            for item in plan.items:\n"
        "                self._write(item, layer)\n",
        "        for layer in range(self._layout.num_layers):\n"
        "            for item in plan.items:\n"
        "                self._write(item, layer)\n"
        "            for source, destination in plan.copies:\n"
        "                self._copy(source, destination)\n",
        "tests/contract/test_runner.py::test_blocks_are_copied_before_anything_is_computed",
    ),
    Bug(
        "a rank that takes long to die is a bug of its worker",
        "engine/ranks/rank_group.py",
        "    except subprocess.TimeoutExpired:\n",
        "    except ChildProcessError:\n",
        f"{RANKS}::test_ranks_that_take_long_to_die_keep_nobody_waiting_and_are_no_bug",
    ),
]
