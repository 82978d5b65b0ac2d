/** What a store on PostgreSQL owes beyond the contract of every store: the driver, the network, and what is between. */
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { openTaskStore } from "../tools.ts";
import { noPostgres, query, startPostgres } from "./support/postgres.ts";
import type { Postgres } from "./support/postgres.ts";

const open = (url: string) => openTaskStore(url, () => {});

const task = (title: string) => ({ title, notes: null, due_at: null });

describe("PostgreSQL", { skip: noPostgres, timeout: 60_000 }, () => {
  let postgres: Postgres;

  before(async () => {
    postgres = await startPostgres();
  });

  after(() => postgres.close());

  test("while a column's type is changed nobody is given another's task, and nobody none", async (t) => {
    const url = await postgres.newDatabase();
    const store = await open(url);
    t.after(() => store.close());
    const owners = Array.from({ length: 40 }, (_, index) => `owner ${index}`);
    for (const owner of owners) await store.create(owner, task(owner));

    let isChanging = true;
    const wrong: string[] = [];
    let answers = 0;
    const callers = owners.map(async (owner) => {
      while (isChanging) {
        const tasks = await store.list(owner, { before: Number.MAX_SAFE_INTEGER, limit: 10 })
          .catch(() => undefined);
        if (tasks === undefined) continue; // an error is no wrong answer
        answers++;
        const titles = tasks.map(({ title }) => title).join();
        if (titles !== owner) wrong.push(`${owner} was given '${titles}'`);
      }
    });
    for (let change = 0; change < 6; change++) {
      await query(
        url,
        `ALTER TABLE tasks ALTER due_at TYPE ${change % 2 ? "TEXT" : `VARCHAR(${40 + change})`}`,
      );
    }
    isChanging = false;
    await Promise.all(callers);
    assert.deepEqual(wrong, []);
    assert.ok(answers > 100, `only ${answers} answers: the test has asked for nothing`);
  });
});
