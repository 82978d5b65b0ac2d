/**
 * `npm run demo`: the whole sign-in and the first tasks, offline, over real HTTP with real tokens.
 *
 * The real `server.ts` runs as its own process and is given its environment and nothing else. In front of it
 * stands the tenant of `tenant.ts`, and the client of `chatgpt.ts` links it for two users, hop by hop; the
 * numbers are those of the README's diagram.
 *
 * `--break SETTING` leaves one setting of the guide out. What then happens is compared with what is expected:
 * exit status 0 only where they agree.
 */
import assert from "node:assert/strict";
import { parseArgs, styleText } from "node:util";
import { Connector, type Hop, publishClientMetadata } from "../support/chatgpt.ts";
import { freePort, spawnServer } from "../support/server.ts";
import {
  ALICE,
  BOB,
  configuredTenant,
  signIn,
  startTenant,
  type Tenant,
  type TenantKind,
  type User,
} from "../support/tenant.ts";

/** All that a setting of the guide can be a part of, before the demo runs. */
interface Setup {
  tenant: Tenant;
  /** Environment of the server. */
  environment: Record<string, string>;
  /** "OIDC enabled" in ChatGPT's form. */
  oidcEnabled: boolean;
}

interface Break {
  about: string;
  /** The step of the README that mends it. */
  step: string;
  /** The kinds of tenant on which the setting counts. */
  kinds: readonly TenantKind[];
  leaveOut: (setup: Setup) => void;
  symptom: RegExp;
}

const STEP_0 = "Step 0. Run the server behind a public URL";
const STEP_1 = "Step 1. Create an API";
const STEP_2 = "Step 2. Configure Default Audience";
const STEP_2_REGISTRATION = `${STEP_2}, Enable client registration`;

const BREAKS: Record<string, Break> = {
  "registration": {
    about: "Dynamic Client Registration is off, as in a new tenant",
    step: STEP_2_REGISTRATION,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.dynamicClientRegistration = false,
    symptom: /Dynamic client registration is disabled/,
  },
  "application-limit": {
    about: "failed attempts have filled the tenant with applications",
    step: STEP_2_REGISTRATION,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.applicationLimit = settings.applications.length,
    symptom: /You reached the limit of entities of this type for this tenant/,
  },
  "default-audience": {
    about: "the tenant has no Default Audience",
    step: STEP_2,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.defaultAudience = "",
    symptom: /^401 .*invalid_token.*JWE of 5 parts/,
  },
  "api-identifier": {
    about: "the API Identifier ends in a slash, MCP_SERVER_URL does not",
    step: STEP_1,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.apis.forEach((api) => api.identifier += "/"),
    symptom: /Oops!.*Service not found: http/,
  },
  "offline-access": {
    about: "Allow Offline Access is off for the API",
    step: `${STEP_1}, API Settings`,
    kinds: ["permissive"],
    leaveOut: ({ tenant: { settings } }) => settings.apis.forEach((api) => api.allowOfflineAccess = false),
    symptom: /No refresh token/,
  },
  "connection": {
    about: "the connection is not promoted to domain level",
    step: "Step 3. Enable a Connection for Third-Party Apps",
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) =>
      settings.connections.forEach((connection) => connection.domainLevel = false),
    symptom: /Oops!.*no connections enabled for the client/,
  },
  "action": {
    about: "the post-login Action is not in the flow",
    step: "Step 4. Create Post-Login Action",
    kinds: ["permissive"],
    leaveOut: ({ tenant: { settings } }) => settings.postLoginAction = false,
    symptom: /OAUTH_SCOPES_MISMATCH.*Not all requested permissions were granted/,
  },
  "default-permissions": {
    about: "the API has no Default Permissions for third-party applications",
    step: `${STEP_1}, API Settings`,
    kinds: ["strict"],
    leaveOut: ({ tenant: { settings } }) =>
      settings.apis.forEach((api) => delete api.defaultPermissionsForThirdPartyApplications),
    symptom: /Oops!.*Client "tpc_\w+" is not authorized to access resource server "http/,
  },
  "oidc": {
    about: "OIDC enabled is left ticked in ChatGPT",
    step: "Step 7. Connect ChatGPT",
    kinds: ["strict"],
    leaveOut: (setup) => setup.oidcEnabled = true,
    symptom: /OAUTH_OWNER_PROFILE_ID_MISSING/,
  },
  "cimd-import": {
    about: "the tenant takes client metadata documents, but ChatGPT's is not imported",
    step: STEP_2_REGISTRATION,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.clientIdMetadataDocumentRegistration = true,
    symptom: /Oops!.*invalid_request: Unknown client: http.*client\.json/,
  },
  "server-url": {
    about: "MCP_SERVER_URL is not the API Identifier: the URL has changed, the tenant has not",
    step: STEP_0,
    kinds: ["permissive", "strict"],
    leaveOut: ({ environment }) => environment.MCP_SERVER_URL += "/v2",
    symptom: /^401 .*invalid_token.*audience.*expected http\S+\/v2/,
  },
  "issuer": {
    about: "AUTH0_DOMAIN is another domain of the same tenant",
    step: STEP_0,
    kinds: ["permissive", "strict"],
    leaveOut: ({ environment, tenant }) =>
      environment.AUTH0_DOMAIN = tenant.origin.replace("localhost", "127.0.0.1"),
    symptom: /^401 .*invalid_token.*issuer http:\/\/localhost\S+ expected http:\/\/127\.0\.0\.1/,
  },
  "signing-keys": {
    about: "the server cannot fetch the tenant's signing keys",
    step: STEP_0,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant }) => tenant.answerJwks = (response) => response.writeHead(500).end(),
    symptom: /^503 .*signing keys cannot be had/,
  },
  "permissions": {
    about: "ENFORCE_SCOPES is on, RBAC too, and the users have no role",
    step: "Make it yours, Permissions per tool",
    kinds: ["permissive"],
    leaveOut: ({ environment, tenant: { settings } }) => {
      environment.ENFORCE_SCOPES = "true";
      settings.apis.forEach((api) => api.enableRbac = true);
    },
    symptom: /^Tool error: Bearer .*insufficient_scope.*tasks:write/,
  },
};

const isColoured = process.stdout.isTTY && !process.env.NO_COLOR;
const paint = (format: Parameters<typeof styleText>[0], text: string) =>
  isColoured ? styleText(format, text) : text;

// A reader that stops early, such as `| head`, must not end this process and leave the server's behind.
process.stdout.on("error", () => {});
process.exitCode = await main(process.argv.slice(2));

/** @returns The exit status. */
async function main(args: string[]): Promise<number> {
  // Not strict, since --break may stand alone.
  const { values, positionals } = parseArgs({
    args,
    options: { tenant: { type: "string" }, break: { type: "string" } },
    strict: false,
  });
  const unknown = [
    ...positionals,
    ...Object.keys(values).filter((name) => name !== "tenant" && name !== "break"),
  ];
  if (unknown.length > 0) return refuse(`Unknown argument: ${unknown.join(" ")}`);

  const { break: setting } = values;
  if (setting === true || setting === "") return listBreaks();
  const broken = Object.hasOwn(BREAKS, String(setting)) ? BREAKS[String(setting)] : undefined;
  if (setting !== undefined && !broken) {
    listBreaks();
    return refuse(`Unknown setting: ${setting}. The known ones are above`);
  }
  const kind = values.tenant ?? broken?.kinds[0] ?? "permissive";
  if (kind !== "permissive" && kind !== "strict") return refuse("--tenant must be permissive or strict");
  if (broken && !broken.kinds.includes(kind)) {
    return refuse(`--break ${setting} is about a ${broken.kinds[0]} tenant: leave --tenant ${kind} out`);
  }
  return await demonstrate(kind, broken);
}

function refuse(line: string): number {
  console.error(line);
  return 1;
}

function listBreaks(): number {
  console.log("Settings that can be left out, npm run demo -- --break SETTING:");
  for (const [name, { about, kinds }] of Object.entries(BREAKS)) {
    console.log(`  ${name.padEnd(20)}${about}${kinds.length === 1 ? ` (${kinds[0]} tenant)` : ""}`);
  }
  return 0;
}

/** Sets everything up as the guide says, but for what is to be left out, and runs it. */
async function demonstrate(kind: TenantKind, broken: Break | undefined): Promise<number> {
  const tenant = await startTenant({ kind });
  const clientMetadata = await publishClientMetadata();
  const port = await freePort();
  const mcpServerUrl = `http://localhost:${port}/mcp`;
  Object.assign(tenant.settings, configuredTenant(kind, mcpServerUrl));
  const setup: Setup = {
    tenant,
    environment: {
      AUTH0_DOMAIN: tenant.origin,
      MCP_SERVER_URL: mcpServerUrl,
      PORT: String(port),
      DATABASE_URL: "memory:",
    },
    oidcEnabled: kind === "permissive",
  };
  broken?.leaveOut(setup);
  const server = spawnServer(setup.environment);
  try {
    await server.ready;
    if (!server.lines.some((line) => line.includes("Listening on"))) {
      throw new Error(`server.ts did not start:\n${server.lines.join("\n")}`);
    }
    console.log(`Tenant   ${tenant.issuer} (stand-in, ${kind})`);
    console.log(`Server   ${setup.environment.MCP_SERVER_URL}`);
    if (broken) console.log(`Left out ${broken.about}`);
    const connectorOf = (user: User, fromHop: number) =>
      new Connector({
        mcpServerUrl: setup.environment.MCP_SERVER_URL ?? "",
        browser: (authorizeUrl) => signIn(authorizeUrl, user),
        oidcEnabled: setup.oidcEnabled,
        clientDocuments: clientMetadata,
        observe: (hop) => hop.number >= fromHop && print(hop),
      });
    const failure = await useTheTools(connectorOf).then(() => undefined, (error: unknown) => error);
    return broken ? explain(broken, failure, tenant) : summarize(failure);
  } finally {
    server.kill("SIGTERM");
    await server.exited;
    await clientMetadata.close();
    await tenant.close();
  }
}

/** Two users link the server and keep a task each. Throws what a user would be stopped by. */
async function useTheTools(connectorOf: (user: User, fromHop: number) => Connector): Promise<void> {
  const alice = connectorOf(ALICE, 1);
  const bob = connectorOf(BOB, 5);
  try {
    heading("Alice links the server");
    await alice.link();
    await createTask(alice, "Buy oat milk");

    heading("Bob links it too (hops 1 to 4 as before)");
    await bob.link();
    await createTask(bob, "Water the plants");

    heading("Each lists the tasks");
    assert.deepEqual(await listTitles(alice), ["Buy oat milk"]);
    assert.deepEqual(await listTitles(bob), ["Water the plants"]);
    assert.notEqual(alice.profile.id, bob.profile.id);

    heading("Alice's access token is about to expire");
    const { refresh_token: used } = alice.tokens;
    await alice.refresh();
    assert.ok(alice.tokens.refresh_token !== used, "The refresh token was not rotated");
    assert.deepEqual(await listTitles(alice), ["Buy oat milk"]);
  } finally {
    await alice.close();
    await bob.close();
  }
}

async function createTask(connector: Connector, title: string): Promise<void> {
  const { isError, content, _meta } = await connector.callTool("create_task", { title });
  if (isError) throw new Error(`Tool error: ${_meta?.["mcp/www_authenticate"] ?? JSON.stringify(content)}`);
}

async function listTitles(connector: Connector): Promise<unknown[]> {
  const { structuredContent } = await connector.callTool("list_tasks");
  const { tasks } = structuredContent as { tasks: { title: string }[] };
  return tasks.map(({ title }) => title);
}

function heading(text: string): void {
  console.log(`\n${paint("bold", text)}`);
}

function print({ number, title, asked, answered, failed }: Hop): void {
  const mark = failed ? paint("red", "failed  ") : paint("green", "answered");
  console.log(`  ${number} ${title}\n      asked    ${asked}\n      ${mark} ${answered}`);
}

function summarize(failure: unknown): number {
  if (failure !== undefined) {
    console.error(failure);
    return 1;
  }
  heading("Summary");
  console.log(
    "  Two users signed in, each sees only their own tasks, and a refreshed token goes on working.\n" +
      "  The tenant and ChatGPT were stand-ins; the server was server.ts as it stands.",
  );
  return 0;
}

function explain({ step, symptom }: Break, failure: unknown, tenant: Tenant): number {
  const seen = failure instanceof Error ? failure.message : "nothing failed";
  const logged = tenant.logs.findLast(({ type }) => type === "f")?.description;
  const isExpected = symptom.test(seen);
  heading("What the user sees");
  console.log(`  Symptom     ${seen}`);
  if (logged) console.log(`  Auth0's log ${logged}`);
  console.log(`  Mended by   README, ${step}`);
  console.log(
    isExpected
      ? "  As expected when this setting is left out."
      : paint("red", `  NOT as expected: ${symptom}`),
  );
  return isExpected ? 0 : 1;
}
