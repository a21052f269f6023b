"""Faults of what keeps others out: the sandbox of model output, and the guard and token of a vLLM server."""

from tests.planted_faults.fault import Fault

POOL, BUDGET, CORES, WORKER, ISOLATION, GUARD = (
    f"entcov/rl/sandbox/{name}.py" for name in ("pool", "budget", "cores", "worker", "isolation", "guard")
)
VALUES, CODE, ASSERTIONS = "entcov/rl/sandbox/values.py", "entcov/rl/rewards/code.py", "entcov/rl/rewards/assertions.py"
SERVER, TOKEN = "entcov/rl/vllm/guard.py", "entcov/rl/vllm/token.py"
T_SANDBOX, T_GUARD, T_GYM, T_SERVER, T_VALUES, T_CODE, T_ASSERTIONS = (
    f"tests/{name}.py::test_"
    for name in (
        "rl/sandbox/test_sandbox",
        "rl/sandbox/test_guard",
        "rl/tasks/test_reasoning_gym",
        "rl/vllm/test_guard",
        "rl/sandbox/test_values",
        "rl/rewards/test_code",
        "rl/rewards/test_assertions",
    )
)
ONE_REPLY = T_SANDBOX + "a_reply_that_is_not_the_one_reply_scores_nothing"
USED_UP = T_SANDBOX + "a_budget_that_is_used_up_pays_for_nothing_more"
NO_TRACE = T_SANDBOX + "programs_leave_no_trace"
CLOSED = T_SERVER + "without_the_right_token_every_route_is_closed"
OPEN = T_SERVER + "the_right_token_opens_the_trainer_s_routes_and_no_others"
NEW_TOKEN = T_SERVER + "a_server_leaves_a_new_token_that_only_its_user_can_read"
OWN_FILE = T_SERVER + "a_token_file_that_others_could_read_or_replace_is_refused"

FAULTS = (
    # ---- verdicts that are forged, and answers that cost nothing -----------------------------------------------------
    Fault(
        "any_nonce_will_do",
        POOL,
        'reply.pop("nonce", None) != nonce',
        'reply.pop("nonce", None) is None',
        [ONE_REPLY + "[wrong nonce]", T_SANDBOX + "replies_in_advance_earn_nothing"],
    ),
    Fault(
        "no_nonce_will_do",
        POOL,
        'reply.pop("nonce", None) != nonce',
        'reply.pop("nonce", nonce) != nonce',
        [ONE_REPLY + "[no nonce]"],
    ),
    Fault(
        "first_of_several_replies_is_taken",
        POOL,
        "reply = json.loads(line)\n",
        'reply = json.loads(line.split(b"\\n")[0])\n',
        [ONE_REPLY + "[twice]"],
    ),
    Fault(
        "process_that_speaks_out_of_turn_goes_on",
        POOL,
        "if worker is not None and worker.is_quiet():",
        "if worker is not None:",
        [T_SANDBOX + "an_answer_does_not_pay_for_the_one_before"],
    ),
    Fault(
        "process_that_said_something_else_goes_on",
        POOL,
        "        except _Disorder:\n            worker.end()\n",
        "        except _Disorder:\n            self._release(worker)\n",
        [ONE_REPLY],
    ),
    Fault(
        "request_that_ends_its_process_is_retried_without_end",
        POOL,
        "retry=False) if retry",
        "retry=True) if retry",
        [T_SANDBOX + "a_process_that_ends_is_replaced_once"],
    ),
    Fault(
        "process_that_was_ended_by_anyone_costs_the_answer",
        POOL,
        "return self._exchange(request, charge, retry=False) if retry else None",
        "return None",
        [T_SANDBOX + "a_process_that_ends_is_replaced_once"],
    ),
    Fault(
        "time_outs_are_not_counted",
        POOL,
        "            charge.timed_out = True\n            charge.spend(",
        "            charge.spend(",
        [T_SANDBOX + "a_process_that_does_not_answer_is_ended"],
    ),
    Fault(
        "time_outs_cost_nothing",
        POOL,
        "            charge.timed_out = True\n            charge.spend(time.monotonic() - started)\n",
        "            charge.timed_out = True\n",
        [USED_UP],
    ),
    Fault(
        "time_outs_that_the_process_kept_are_not_counted",
        POOL,
        'charge.timed_out |= bool(reply.get("timed_out"))',
        "pass",
        [T_SANDBOX + "a_time_out_that_the_process_kept_itself_counts_and_is_paid_by_its_own_clock"],
    ),
    Fault("budget_has_no_end", BUDGET, "return self.budget.seconds > 0", "return True", [USED_UP]),
    Fault(
        "budget_is_not_spent",
        BUDGET,
        "self.budget.seconds -= seconds",
        "self.budget.seconds -= 0.0",
        [USED_UP],
    ),
    Fault(
        "quota_of_the_container_is_ignored",
        CORES,
        "min(cores, _quota(root))",
        "cores",
        [T_SANDBOX + "free_cores"],
    ),
    Fault(
        "ranks_of_a_node_take_all_its_cores_each",
        CORES,
        "max(1, int(ranks) if ranks.isdecimal() else 1)",
        "1",
        [T_SANDBOX + "free_cores"],
    ),
    Fault(
        "part_of_a_score_is_a_success",
        WORKER,
        'b"1" if value == 1.0 else b"0"',
        'b"1" if value > 0 else b"0"',
        [T_GYM + "reasoning_gym_partial_credit_is_no_success_and_its_exceptions_are_zeros"],
        slow="imports reasoning-gym",
    ),
    # ---- the reward of programs --------------------------------------------------------------------------------------
    Fault(
        "program_is_told_what_is_expected",
        CODE,
        "outcomes = call_program(source, self.calls, limit",
        'outcomes = call_program(f"{source}\\n_ = {self.expected}", self.calls, limit',
        [T_CODE + "what_is_expected_is_not_in_the_program_s_process"],
    ),
    Fault(
        "object_of_a_program_is_equal_to_what_is_expected",
        VALUES,
        "        return False\n\n    __hash__",
        "        return True\n\n    __hash__",
        [T_VALUES + "other_objects_are_equal_to_nothing"],
    ),
    Fault(
        "one_right_result_is_enough",
        CODE,
        "len(outcomes) == len(self.calls) and all(",
        "len(outcomes) == len(self.calls) and any(",
        [T_CODE + "all_tests_must_pass[calls]"],
    ),
    Fault(
        "results_of_a_program_that_ended_early_are_enough",
        CODE,
        "len(outcomes) == len(self.calls) and all(\n",
        "all(\n",
        [T_CODE + "hostile_programs_earn_nothing_and_the_next_program_runs[calls]"],
        slow="runs 40 programs, some to their limit",
    ),
    Fault(
        "program_that_crashes_after_its_output_passes",
        CODE,
        "done.ended_by or done.status or not",
        "done.ended_by or not",
        [T_CODE + "what_the_forms_of_tests_mean"],
    ),
    Fault(
        "tests_of_a_program_have_no_time_in_all",
        CODE,
        "limit=min(left, TEST_LIMIT)",
        "limit=TEST_LIMIT",
        [T_CODE + "time_is_limited_for_each_test_and_for_all"],
    ),
    Fault(
        "time_of_a_call_is_not_given_anew",
        WORKER,
        '            if each is not None and b"\\n" in data:\n',
        "            if False:\n",
        [T_CODE + "each_call_has_its_own_time"],
    ),
    Fault(
        "call_may_take_the_time_of_all",
        WORKER,
        "line_deadline = deadline if each is None else",
        "line_deadline = deadline if True else",
        [T_CODE + "each_call_has_its_own_time"],
        slow="until the limit of all calls ends the program",
    ),
    Fault(
        "first_block_counts",
        CODE,
        "            blocks[language in",
        "            blocks.setdefault(False, '')\n            blocks[language not in",
        [T_CODE + "the_last_block_of_python_counts_else_the_last_block"],
    ),
    Fault(
        "test_that_calls_nothing_is_passed_by_every_program",
        ASSERTIONS,
        "        if not self.calls:\n",
        "        if False:\n",
        [T_ASSERTIONS + "what_cannot_be_judged_is_refused_when_it_is_read"],
    ),
    Fault(
        "exception_in_a_call_is_overlooked",
        ASSERTIONS,
        "if any(outcome.raised for outcome in outcomes):",
        "if False:",
        [T_ASSERTIONS + "a_statement_holds_for_right_values_alone"],
    ),
    Fault(
        "rows_with_tests_that_cannot_be_judged_are_kept",
        "entcov/rl/data/code_rows.py",
        "    except ValueError:\n        return None\n    return truth\n",
        "    except ValueError:\n        pass\n    return truth\n",
        ["tests/rl/data/test_code_rows.py::test_every_set_becomes_rows_that_are_paid_for_right_programs[acecode]"],
    ),
    Fault(
        "rows_whose_own_solution_fails_are_kept",
        "entcov/rl/data/code_rows.py",
        "truth is not None and passes(",
        "truth is not None or passes(",
        ["tests/rl/data/test_code_rows.py::test_every_set_becomes_rows_that_are_paid_for_right_programs[kodcode]"],
    ),
    Fault(
        "program_needs_the_values_that_it_was_shown_alone",
        "entcov/rl/tasks/programs.py",
        "TESTED = (*SHOWN, 3, 25, 100, -7)",
        "TESTED = SHOWN",
        ["tests/rl/tasks/test_tasks.py::test_a_program_is_scored_by_what_it_computes"],
    ),
    # ---- what a program can do ---------------------------------------------------------------------------------------
    Fault(
        "landlock_is_left_out",
        ISOLATION,
        "        _syscall(_LANDLOCK_RESTRICT, files, 0)\n",
        "        pass\n",
        [T_SANDBOX + "no_program_outlives_its_end"],
    ),
    Fault(
        "seccomp_is_left_out",
        ISOLATION,
        "        install(_program(threads))\n",
        "        pass\n",
        [T_SANDBOX + "no_program_outlives_its_end"],
    ),
    Fault(
        "layer_that_does_not_hold_is_not_noticed",
        WORKER,
        '    if found:\n        raise RuntimeError(f"the sandbox',
        '    if False:\n        raise RuntimeError(f"the sandbox',
        [T_SANDBOX + "a_layer_that_does_not_hold_is_noticed"],
    ),
    Fault(
        "programs_run_without_isolation",
        "entcov/rl/sandbox/programs.py",
        "if lacking := _pool().lacking():",
        "if lacking := None:",
        [T_SANDBOX + "without_seccomp_programs_are_refused"],
        slow="imports math-verify in a process without seccomp",
    ),
    Fault(
        "programs_may_send_signals",
        ISOLATION,
        '"getpid": (39, 172),',
        '"getpid": (39, 172), "kill": (62, 129),',
        [NO_TRACE],
    ),
    Fault(
        "programs_may_change_metadata",
        ISOLATION,
        '"getpid": (39, 172),',
        '"getpid": (39, 172), "chmod": (90, None), "fchmodat": (268, 53),',
        [NO_TRACE],
    ),
    Fault(
        "all_files_may_be_read",
        ISOLATION,
        "    for path in paths:\n        try:\n            place",
        '    for path in [*paths, "/"]:\n        try:\n            place',
        [T_SANDBOX + "no_program_outlives_its_end"],
    ),
    Fault(
        "programs_have_the_trainers_environment",
        POOL,
        "            env=environment,\n",
        "            env=os.environ | environment,\n",
        [NO_TRACE],
    ),
    Fault(
        "programs_have_the_memory_of_a_scorer",
        WORKER,
        "memory=_PROGRAM_MEMORY,",
        "memory=_MEMORY,",
        [T_SANDBOX + "a_program_has_less_than_2_gib"],
    ),
    Fault(
        "programs_may_run_for_longer_than_their_limit",
        WORKER,
        "started + limit, most_output",
        "started + limit + 30, most_output",
        [T_SANDBOX + "no_program_outlives_its_end"],
        slow="until the kernel ends the program",
    ),
    Fault(
        "programs_have_the_pipe_of_the_worker",
        WORKER,
        "                os.closerange(3 if files is None else 4, 1 << 16)\n",
        "",
        [T_SANDBOX + "a_program_cannot_write_to_the_trainer"],
    ),
    Fault(
        "answers_may_be_any_call",
        GUARD,
        "if name in _FUNCTIONS:",
        "if name:",
        [T_GUARD + "all_else_is_refused"],
    ),
    Fault(
        "answers_may_be_any_expression",
        GUARD,
        "if not isinstance(node, _LITERALS):",
        "if False:",
        [T_GUARD + "what_is_no_literal_is_refused[1 < 2]"],
    ),
    Fault(
        "text_of_a_token_is_not_looked_at",
        GUARD,
        "if not _TOKENS[name].fullmatch(str(value)):",
        "if False:",
        [T_GUARD + "all_else_is_refused"],
    ),
    Fault(
        "library_that_evaluates_elsewhere_is_not_noticed",
        GUARD,
        '    raise RuntimeError(f"{what} evaluates',
        '    return\n    raise RuntimeError(f"{what} evaluates',
        [T_GUARD + "a_library_that_evaluates_elsewhere_is_noticed"],
    ),
    # ---- the vLLM server ---------------------------------------------------------------------------------------------
    Fault("any_token_opens", SERVER, " and hmac.compare_digest(given[0], self._expected)", "", [CLOSED]),
    Fault(
        "start_of_the_token_opens",
        SERVER,
        "hmac.compare_digest(given[0], self._expected)",
        "self._expected.startswith(given[0])",
        [CLOSED],
    ),
    Fault("second_token_is_not_looked_at", SERVER, "len(given) == 1 and", "given and", [CLOSED]),
    Fault(
        "websockets_pass",
        SERVER,
        'if scope["type"] == "lifespan":',
        'if scope["type"] in ("lifespan", "websocket"):',
        [OPEN, CLOSED],
    ),
    Fault(
        "all_routes_are_open_to_the_token",
        SERVER,
        'scope["type"] != "http" or (scope["method"], scope["path"]) not in ROUTES',
        'scope["type"] != "http"',
        [OPEN],
    ),
    Fault(
        "methods_are_not_looked_at",
        SERVER,
        '(scope["method"], scope["path"]) not in ROUTES',
        'scope["path"] not in {path for _, path in ROUTES}',
        [OPEN],
    ),
    Fault(
        "one_route_too_many",
        SERVER,
        '("GET", "/health"),',
        '("GET", "/health"), ("POST", "/collective_rpc"),',
        [OPEN, T_SERVER + "the_routes_are_those_that_the_client_calls"],
    ),
    Fault("token_is_printed", TOKEN, "value: str = field(repr=False)", "value: str = field()", [NEW_TOKEN]),
    Fault("token_file_is_open_to_others", TOKEN, ".encode(), mode=0o600)", ".encode())", [NEW_TOKEN]),
    Fault(
        "folder_of_the_tokens_is_open_to_others", TOKEN, ", exist_ok=True, mode=0o700)", ", exist_ok=True)", [NEW_TOKEN]
    ),
    Fault("mode_of_the_token_file_is_not_checked", TOKEN, " or found.st_mode & 0o077", "", [OWN_FILE]),
    Fault("token_file_may_be_a_link", TOKEN, " | os.O_NOFOLLOW", "", [OWN_FILE]),
    Fault(
        "own_token_goes_to_every_machine",
        TOKEN,
        "socket.gethostname() if _is_this_machine(host) else host",
        "socket.gethostname()",
        [T_SERVER + "a_token_file_goes_to_its_own_machine_and_port_alone"],
    ),
    Fault(
        "token_may_be_anything",
        TOKEN,
        "if not _VALID.fullmatch(self.value):",
        "if False:",
        [T_SERVER + "the_variable_serves_every_machine_and_leaves_no_file", T_SERVER + "no_guard_without_a_token"],
    ),
)
