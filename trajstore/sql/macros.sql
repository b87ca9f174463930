-- Table macros over the views experiments, runs and metrics. Those that begin with _ are parts of the others.
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
        named.experiment, (SELECT coalesce(list(e.experiment ORDER BY e.experiment), []) FROM experiments e))
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

-- The steps that any slab of an experiment recorded: place counts them up, back counts them down from the last, and
-- even tells whether an adaptive grid has them at one distance as far back as the window reaches.
CREATE OR REPLACE MACRO _grid(experiment, steps) AS TABLE
WITH
    seen AS (SELECT DISTINCT m.step FROM metrics m WHERE m.experiment = experiment),
    adaptive AS (
        SELECT any_value(e.config->'record'->>'adaptive') AS "by" FROM experiments e WHERE e.experiment = experiment
    ),
    placed AS (
        SELECT
            s.step, s.step - lag(s.step) OVER (ORDER BY s.step) AS gap,
            row_number() OVER (ORDER BY s.step) AS place, row_number() OVER (ORDER BY s.step DESC) AS back
        FROM seen s
    )
SELECT
    p.step, p.place, p.back, a."by" AS adaptive,
    a."by" IS NULL OR min(p.gap) OVER w = max(p.gap) OVER w AS even
FROM placed p, adaptive a
WINDOW w AS (ORDER BY p.step ROWS BETWEEN greatest(steps - 2, 0) PRECEDING AND CURRENT ROW);

-- Everything that is known of the last steps of each slab. A line is fitted by least squares to values and steps that
-- are centred first, and values are taken relative to the first of them before that, so that a large level costs
-- no digits.
CREATE OR REPLACE MACRO _tail(experiment, metric, steps) AS TABLE
WITH
    grid AS (SELECT g.* FROM _grid(experiment, steps) g WHERE g.back <= 2 * steps),
    span AS (
        SELECT
            count(*) FILTER (g.back <= steps) AS steps, min(g.step) FILTER (g.back <= steps) AS from_step,
            max(g.step) AS to_step, bool_and(g.even) FILTER (g.back = 1) AS even, any_value(g.adaptive) AS adaptive
        FROM grid g
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
            sum(r.x * r.x) AS xx, sum((r.risen - f.risen) ** 2) AS yy,
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
            coalesce(b.usable, 0) = steps AS before_whole,
            CASE
                WHEN s.steps < steps
                THEN s.steps || ' steps are recorded, fewer than ' || steps
                WHEN NOT s.even
                THEN 'the grid is adaptive: steps ' || s.from_step || ' to ' || s.to_step || ' are recorded where '
                    || s.adaptive || ' changes most; record them evenly'
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
        LEFT JOIN summed t ON t."order" = r."order" AND t.seed = r.seed AND t.tail
        LEFT JOIN summed b ON b."order" = r."order" AND b.seed = r.seed AND NOT b.tail
        LEFT JOIN moves u ON u."order" = r."order" AND u.seed = r.seed AND u.tail
        LEFT JOIN moves c ON c."order" = r."order" AND c.seed = r.seed AND NOT c.tail
        LEFT JOIN jumps j ON j."order" = r."order" AND j.seed = r.seed
        WHERE r.experiment = experiment
    )
SELECT
    j."order", j.seed, j.from_step, j.to_step, j.why, j.before_whole,
    CASE WHEN j.why IS NULL THEN j.yy / (steps - 1) END AS level,
    CASE WHEN j.why IS NULL THEN j.residual / (steps - 2) END AS detrended,
    CASE WHEN j.why IS NULL THEN j.jumps / (steps - 2) / 2 END AS stepwise,
    CASE WHEN j.why IS NULL THEN j.last END AS last,
    CASE WHEN j.why IS NULL THEN j.diameter END AS diameter,
    CASE WHEN j.why IS NULL AND j.before_whole THEN j.moved_before END AS moved_before,
    CASE WHEN j.why IS NULL THEN j.moved END AS moved,
    CASE WHEN j.why IS NULL THEN j.slope END AS slope,
    CASE WHEN j.why IS NULL THEN j.slope / nullif(sqrt(j.residual / (steps - 2) / j.xx), 0) END AS slope_t
FROM judged j;

-- Sample variance over the last steps that were recorded: descent and noise together.
CREATE OR REPLACE MACRO level_variance(experiment, metric, steps := 100) AS TABLE
SELECT t."order", t.seed, t.from_step, t.to_step, t.level AS variance, t.why FROM _tail(experiment, metric, steps) t
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- Residual variance about a line over the last steps that were recorded, divided by their number less two.
CREATE OR REPLACE MACRO tail_variance(experiment, metric, steps := 100) AS TABLE
SELECT t."order", t.seed, t.from_step, t.to_step, t.detrended AS variance, t.why FROM _tail(experiment, metric, steps) t
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- Half the sample variance of successive differences over the last steps that were recorded.
CREATE OR REPLACE MACRO step_variance(experiment, metric, steps := 100) AS TABLE
SELECT t."order", t.seed, t.from_step, t.to_step, t.stepwise AS variance, t.why FROM _tail(experiment, metric, steps) t
UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- What speaks for and against convergence over the last steps that were recorded. The verdict is not given here.
CREATE OR REPLACE MACRO convergence(experiment, metric, steps := 100) AS TABLE
SELECT
    t."order", t.seed, t.from_step, t.to_step, t.last, t.diameter, t.moved_before, t.moved, t.slope, t.slope_t,
    CASE
        WHEN t.why IS NOT NULL THEN t.why
        WHEN NOT t.before_whole
        THEN 'moved_before: not all of the ' || steps || ' steps before step ' || t.from_step || ' have a finite value'
    END AS why
FROM _tail(experiment, metric, steps) t
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 3) f;

-- Sample variance over the steps that end at each.
CREATE OR REPLACE MACRO rolling_variance(experiment, metric, steps := 100) AS TABLE
WITH
    points AS (
        SELECT
            v."order", v.seed, v.step, g.place, g.even, g.adaptive, v.value,
            CASE WHEN abs(v.value) < 1e150 THEN v.value END AS usable
        FROM _series(experiment, metric) v JOIN _grid(experiment, steps) g ON g.step = v.step
    ),
    rolled AS (
        SELECT
            p."order", p.seed, p.step, p.place, p.even, p.adaptive, var_samp(p.usable) OVER w AS variance,
            count(p.value) OVER w AS measured, count(p.usable) OVER w AS usable,
            p.place - lag(p.place, steps - 1) OVER (PARTITION BY p."order", p.seed ORDER BY p.step) AS reach
        FROM points p
        WINDOW w AS (PARTITION BY p."order", p.seed ORDER BY p.step ROWS BETWEEN steps - 1 PRECEDING AND CURRENT ROW)
    ),
    judged AS (
        SELECT r.*, CASE
            WHEN r.place < steps THEN r.place || ' steps are recorded up to here, fewer than ' || steps
            WHEN r.reach IS NULL OR r.reach > steps - 1 THEN 'steps before this one are missing; finish the recording'
            WHEN NOT r.even THEN 'the grid is adaptive: steps are recorded where ' || r.adaptive || ' changes most'
            WHEN r.measured < steps THEN 'not measured at ' || (steps - r.measured) || ' of the steps'
            WHEN r.usable < steps THEN 'not finite, or too large to square, at ' || (steps - r.usable) || ' of the steps'
        END AS why
        FROM rolled r
    )
SELECT j."order", j.seed, j.step, CASE WHEN j.why IS NULL THEN j.variance END AS variance, j.why FROM judged j
UNION ALL SELECT NULL, NULL, NULL, NULL, f.why FROM _fails(experiment, metric, steps, 2) f;
