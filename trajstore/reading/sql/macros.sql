-- Table macros over the views experiments, runs and metrics. Those that begin with _ are parts of the others; _known are
-- the experiments that can be read.
--
-- A macro answers for a slab with numbers, or with NULL and the reason in the column why; what makes no sense for any
-- slab (a name that is not there, a window that is too short) is an error. Parameters stand unqualified, columns
-- behind a table's name.

-- The end of an error: the nearest name, or all of them.
CREATE OR REPLACE MACRO _nearest(name, known) AS
CASE
    WHEN len(known) = 0 THEN 'there is none'
    WHEN list_max(list_transform(known, lambda k: jaro_winkler_similarity(k, coalesce(name, '')))) >= 0.8
    THEN 'did you mean ''' || list_reduce(
        known, lambda a, b: CASE
            WHEN jaro_winkler_similarity(b, name) > jaro_winkler_similarity(a, name) THEN b ELSE a END
    ) || '''?'
    ELSE 'there is ' || array_to_string(known, ', ')
END;

-- What is wrong with a request, NULL where nothing is: always one row.
CREATE OR REPLACE MACRO _refused(experiment, metric, steps, fewest) AS TABLE
WITH
    named AS (SELECT experiment AS experiment, metric AS metric),
    found AS (SELECT any_value(e.metrics) AS metrics FROM experiments e WHERE e.experiment = experiment)
SELECT CASE
    WHEN found.metrics IS NULL
    THEN 'no experiment ''' || coalesce(named.experiment, 'NULL') || '''; ' || _nearest(
        named.experiment, (SELECT coalesce(list(k.experiment ORDER BY k.experiment), []) FROM _known k))
    WHEN NOT coalesce(list_contains(found.metrics, named.metric), false)
    THEN 'experiment ''' || named.experiment || ''' has no metric ''' || coalesce(named.metric, 'NULL') || '''; '
        || _nearest(named.metric, list_sort(found.metrics))
    WHEN coalesce(steps, 0) < fewest
    THEN 'steps is ' || coalesce(steps::VARCHAR, 'NULL') || '; at least ' || fewest || ' are needed here'
END AS why
FROM named, found;

-- A macro whose rows these are put below fails with what is wrong. Not a column but the condition raises it: nothing
-- that is asked of a table lets its condition be skipped.
CREATE OR REPLACE MACRO _fails(experiment, metric, steps, fewest) AS TABLE
SELECT r.why FROM _refused(experiment, metric, steps, fewest) r
WHERE CASE WHEN r.why IS NOT NULL THEN error(r.why)::VARCHAR END IS NOT NULL;

-- The steps at which any slab of an experiment measured a metric, as the analysis in Python counts them: the last one is
-- not among them if it comes before its time, since it is recorded on any grid. place counts them up, back counts them
-- down, and even tells whether they have one distance as far back as the window reaches.
CREATE OR REPLACE MACRO _grid(experiment, metric, steps) AS TABLE
WITH
    seen AS (SELECT DISTINCT v.step FROM _series(experiment, metric) v WHERE v.value IS NOT NULL),
    placed AS (
        SELECT
            s.step, s.step - lag(s.step) OVER by_step AS gap, row_number() OVER by_step AS place,
            count(*) OVER () AS last
        FROM seen s WINDOW by_step AS (ORDER BY s.step)
    ),
    kept AS (
        SELECT p.*, count(*) OVER () AS there
        FROM (SELECT q.*, lag(q.gap) OVER (ORDER BY q.step) AS gap_before FROM placed q) p
        WHERE NOT coalesce(p.place = p.last AND p.gap < p.gap_before, false)
    )
SELECT
    k.step, k.place, k.there - k.place + 1 AS back,
    coalesce(min(k.gap) OVER w = max(k.gap) OVER w, true) AS even
FROM kept k
WINDOW w AS (ORDER BY k.step ROWS BETWEEN greatest(steps - 2, 0) PRECEDING AND CURRENT ROW);

-- Why no number is given for steps at uneven distances.
CREATE OR REPLACE MACRO _uneven(experiment) AS TABLE
SELECT ' are recorded at uneven distances' || coalesce(' where ' || any_value(e.config->'record'->>'adaptive')
    || ' changes most', '') || '; record them evenly, or choose a window that is even' AS why
FROM experiments e WHERE e.experiment = experiment;

-- A variance that may be the square of a rounding error is none: even the mean of equal numbers may be off by one.
CREATE OR REPLACE MACRO _beyond_rounding(variance, largest) AS
CASE WHEN variance <= (4 * 2.220446049250313e-16 * largest) ** 2 THEN 0.0 ELSE variance END;

-- Everything that is known of the last steps of each slab. A line is fitted by least squares to values and steps that
-- are centred first, and values are taken relative to the first of them before that, so that a large level costs
-- no digits.
CREATE OR REPLACE MACRO _tail(experiment, metric, steps) AS TABLE
WITH
    grid AS (SELECT g.* FROM _grid(experiment, metric, steps) g WHERE g.back <= 2 * steps),
    gaps AS (SELECT g.*, g.step - lag(g.step) OVER (ORDER BY g.step) AS gap FROM grid g),
    span AS (
        SELECT
            count(*) FILTER (g.back <= steps) AS steps, min(g.step) FILTER (g.back <= steps) AS from_step,
            max(g.step) AS to_step, count(DISTINCT g.gap) FILTER (g.back < steps) <= 1 AS even,
            count(DISTINCT g.gap) <= 1 AS before_even
        FROM gaps g
    ),
    points AS (
        SELECT
            v."order", v.seed, v.step, g.back <= steps AS tail, v.value,
            CASE WHEN abs(v.value) < 1e150 THEN v.value END AS usable
        FROM _series(experiment, metric) v JOIN grid g ON g.step = v.step
    ),
    first_of AS (
        SELECT p."order", p.seed, p.tail, avg(p.step) AS step, arg_min(p.usable, p.step) AS value
        FROM points p GROUP BY ALL
    ),
    relative AS (
        SELECT p.*, p.step - f.step AS x, p.usable - f.value AS risen
        FROM points p JOIN first_of f ON f."order" = p."order" AND f.seed = p.seed AND f.tail = p.tail
    ),
    fit AS (
        SELECT r."order", r.seed, r.tail, avg(r.risen) AS risen, sum(r.x * r.risen) / sum(r.x * r.x) AS slope
        FROM relative r GROUP BY ALL
    ),
    summed AS (
        SELECT
            r."order", r.seed, r.tail, f.slope,
            count(*) AS there, count(r.value) AS measured, count(r.usable) AS usable,
            min(r.step) FILTER (r.value IS NULL) AS unmeasured_at,
            min(r.step) FILTER (r.value IS NOT NULL AND r.usable IS NULL) AS infinite_at,
            arg_max(r.usable, r.step) AS last, max(r.risen) - min(r.risen) AS diameter,
            max(abs(r.usable)) AS largest, sum(r.x * r.x) AS xx, sum((r.risen - f.risen) ** 2) AS yy,
            sum((r.risen - f.risen - f.slope * r.x) ** 2) AS residual
        FROM relative r JOIN fit f ON f."order" = r."order" AND f.seed = r.seed AND f.tail = r.tail
        GROUP BY ALL
    ),
    differences AS (
        SELECT p."order", p.seed, p.tail, p.usable - lag(p.usable) OVER part AS difference
        FROM points p WINDOW part AS (PARTITION BY p."order", p.seed, p.tail ORDER BY p.step)
    ),
    moves AS (
        SELECT d."order", d.seed, d.tail, avg(abs(d.difference)) AS moved, avg(d.difference) AS difference
        FROM differences d GROUP BY ALL
    ),
    jumps AS (
        SELECT d."order", d.seed, sum((d.difference - m.difference) ** 2) AS jumps
        FROM differences d JOIN moves m ON m."order" = d."order" AND m.seed = d.seed AND m.tail = d.tail
        WHERE d.tail GROUP BY ALL
    ),
    judged AS (
        SELECT
            r."order", r.seed, s.from_step, s.to_step, t.*, u.moved, c.moved AS moved_before, j.jumps,
            CASE
                WHEN coalesce(b.usable, 0) < steps
                THEN 'not all of the ' || steps || ' steps before step ' || s.from_step || ' have a finite value'
                WHEN NOT s.before_even
                THEN 'the ' || steps || ' steps before step ' || s.from_step || ' are recorded at other distances'
            END AS why_before,
            CASE
                WHEN s.steps = 0
                THEN 'not measured at any recorded step'
                WHEN s.steps < steps
                THEN 'measured at ' || s.steps || ' steps, fewer than ' || steps
                WHEN NOT s.even
                THEN 'steps ' || s.from_step || ' to ' || s.to_step || e.why
                WHEN coalesce(t.there, 0) < steps
                THEN 'only ' || coalesce(t.there, 0) || ' of the ' || steps || ' steps from ' || s.from_step || ' to '
                    || s.to_step || ' are recorded; finish the recording'
                WHEN t.measured = 0
                THEN 'not measured from step ' || s.from_step || ' to ' || s.to_step
                WHEN t.measured < steps
                THEN 'not measured at step ' || t.unmeasured_at
                WHEN t.usable < steps
                THEN 'not finite, or too large to square, at step ' || t.infinite_at
            END AS why
        FROM runs r
        CROSS JOIN span s
        CROSS JOIN _uneven(experiment) e
        LEFT JOIN summed t ON t."order" = r."order" AND t.seed = r.seed AND t.tail
        LEFT JOIN summed b ON b."order" = r."order" AND b.seed = r.seed AND NOT b.tail
        LEFT JOIN moves u ON u."order" = r."order" AND u.seed = r.seed AND u.tail
        LEFT JOIN moves c ON c."order" = r."order" AND c.seed = r.seed AND NOT c.tail
        LEFT JOIN jumps j ON j."order" = r."order" AND j.seed = r.seed
        WHERE r.experiment = experiment
    )
SELECT
    j."order", j.seed, j.from_step, j.to_step, j.why, j.why_before,
    CASE WHEN j.why IS NULL THEN _beyond_rounding(j.yy / (steps - 1), j.largest) END AS level,
    CASE WHEN j.why IS NULL THEN _beyond_rounding(j.residual / (steps - 2), j.largest) END AS detrended,
    CASE WHEN j.why IS NULL THEN _beyond_rounding(j.jumps / (steps - 2) / 2, j.largest) END AS stepwise,
    CASE WHEN j.why IS NULL THEN j.last END AS last,
    CASE WHEN j.why IS NULL THEN j.diameter END AS diameter,
    CASE WHEN j.why IS NULL AND j.why_before IS NULL THEN j.moved_before END AS moved_before,
    CASE WHEN j.why IS NULL THEN j.moved END AS moved,
    CASE WHEN j.why IS NULL THEN j.slope END AS slope,
    CASE WHEN j.why IS NULL THEN j.slope / nullif(sqrt(j.residual / (steps - 2) / j.xx), 0) END AS slope_t
FROM judged j;

-- Sample variance over the last steps at which it was measured: descent and noise together.
CREATE OR REPLACE MACRO level_variance(experiment, metric, steps := 100) AS TABLE
SELECT t."order", t.seed, t.from_step, t.to_step, t.level AS variance, t.why FROM _tail(experiment, metric, steps) t
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- Residual variance about a line over the last steps at which it was measured, divided by their number less two.
CREATE OR REPLACE MACRO tail_variance(experiment, metric, steps := 100) AS TABLE
SELECT t."order", t.seed, t.from_step, t.to_step, t.detrended AS variance, t.why FROM _tail(experiment, metric, steps) t
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- Half the sample variance of successive differences over the last steps at which it was measured.
CREATE OR REPLACE MACRO step_variance(experiment, metric, steps := 100) AS TABLE
SELECT t."order", t.seed, t.from_step, t.to_step, t.stepwise AS variance, t.why FROM _tail(experiment, metric, steps) t
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- What speaks for and against convergence over the last steps at which it was measured. The verdict is not given here.
CREATE OR REPLACE MACRO convergence(experiment, metric, steps := 100) AS TABLE
SELECT
    t."order", t.seed, t.from_step, t.to_step, t.last, t.diameter, t.moved_before, t.moved, t.slope, t.slope_t,
    coalesce(t.why, 'moved_before: ' || t.why_before) AS why
FROM _tail(experiment, metric, steps) t
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- Residual variance about a line over the steps that end at each. It is what the line takes from the variance about the
-- mean, so that a steep descent costs digits; where it would cost too many, there is no number. Values are taken
-- relative to the last one, so that a large level costs none.
CREATE OR REPLACE MACRO rolling_variance(experiment, metric, steps := 100) AS TABLE
WITH
    points AS (
        SELECT
            v."order", v.seed, v.step, g.place, g.even, v.value,
            CASE WHEN abs(v.value) < 1e150 THEN v.value END AS usable,
            CASE WHEN abs(v.value) < 1e150 THEN v.value END
                - arg_max(v.value, v.step) FILTER (abs(v.value) < 1e150) OVER (PARTITION BY v."order", v.seed) AS risen
        FROM _series(experiment, metric) v LEFT JOIN _grid(experiment, metric, steps) g ON g.step = v.step
    ),
    summed AS (
        SELECT
            p.*, steps * var_pop(p.risen) OVER w AS yy, steps * covar_pop(p.risen, p.place) OVER w AS xy,
            max(abs(p.usable)) OVER w AS largest, count(p.usable) OVER w AS whole,
            p.place - lag(p.place, steps - 1) OVER (PARTITION BY p."order", p.seed ORDER BY p.step) AS reach
        FROM points p WHERE p.place IS NOT NULL
        WINDOW w AS (PARTITION BY p."order", p.seed ORDER BY p.step ROWS BETWEEN steps - 1 PRECEDING AND CURRENT ROW)
    ),
    fit AS (
        SELECT s.*, greatest(s.yy - s.xy * s.xy * 12 / (steps * (steps * steps - 1.0)), 0) AS residual FROM summed s
    ),
    judged AS (
        SELECT f."order", f.seed, f.step, _beyond_rounding(f.residual / (steps - 2), f.largest) AS variance, CASE
            WHEN f.value IS NULL THEN 'not measured at this step'
            WHEN f.place < steps THEN 'measured at ' || f.place || ' steps up to here, fewer than ' || steps
            WHEN f.reach IS NULL OR f.reach > steps - 1
            THEN 'steps before this one are missing; finish the recording'
            WHEN NOT f.even THEN 'the ' || steps || ' steps up to here' || e.why
            WHEN f.whole < steps
            THEN 'not measured, not finite, or too large to square at ' || (steps - f.whole) || ' of the steps'
            WHEN f.residual < 1e-10 * f.yy
            THEN 'a line leaves less than 1e-10 of the variance: too few digits here; ask analysis.rolling_variance'
        END AS why
        FROM fit f CROSS JOIN _uneven(experiment) e
    )
SELECT j."order", j.seed, j.step, CASE WHEN j.why IS NULL THEN j.variance END AS variance, j.why FROM judged j
UNION ALL
SELECT
    p."order", p.seed, p.step, NULL, CASE
        WHEN p.value IS NULL THEN 'not measured at this step'
        ELSE 'this last step comes before its time: it is not on the grid of the others'
    END
FROM points p WHERE p.place IS NULL
UNION ALL SELECT NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;
